"""The Squeezing-Heads Distillation loss (docs/method.md section 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.config import SHDConfig
from shd_diffusion.losses.assignment import assignment_costs, best_assignment
from shd_diffusion.losses.blocks import LayerMap, map_blocks
from shd_diffusion.losses.divergence import DIVERGENCES, Divergence
from shd_diffusion.losses.explanation import Explanation, explain
from shd_diffusion.losses.grids import common_grid, on_grid, sample_rows, take
from shd_diffusion.losses.schedule import within
from shd_diffusion.losses.streaming import Pool, map_divergence
from shd_diffusion.losses.targets import SqueezedTeacher, map_stream
from shd_diffusion.squeezing.coefficients import Coefficient
from shd_diffusion.squeezing.matching import match_merges
from shd_diffusion.squeezing.plan import Merge, Plan, check_plan, parse_plan, plan_merges
from shd_diffusion.squeezing.weights import Granularity, Squeezer, prepare

Records = Mapping[str, AttentionRecord]


class NonFiniteError(ValueError):
    """Attention maps or values that are not finite; the message names the block."""


@dataclass
class SHDLoss:
    """Mean over blocks, samples, heads and query rows of τ² · divergence(squeezed teacher map, student map).

    The defaults are the paper's method. Nothing about the teacher receives a gradient; the student's queries
    and keys do. Maps are computed in float32 or better, chunk by chunk.

    Args:
        temperature: τ, softens both maps.
        layer_map: which teacher block each student block learns from, see `map_blocks`.
        divergence: a key of `DIVERGENCES`.
        pairing: `adjacent`, `matched` (call `calibrate` first, or set `plans`), or one plan for all blocks.
        granularity, merge, coefficient: see `squeeze_heads`.
        assignment: student head j learns squeezed map j (`order`), or the heads are assigned to the maps with
            the least running mean of divergences (`optimal`).
        rows: share of query rows taken, drawn by step and block.
        coefficient_rows: with rows < 1, take sample-wise coefficients from `all` rows, which leaves the loss an
            unbiased estimate, or from the `sampled` ones, which is cheaper.
        timesteps: first and last timestep at which the term counts; samples outside add 0 to the mean.
        chunk_rows: query rows, counted over samples, whose maps may exist at once; None leaves it to the device.
        compile: have `torch.compile` fuse the work on the maps. On a CPU that takes a C++ compiler; where maps come
            in many chunks, it takes long.
        seed: of the rows.

    Attributes:
        plans: calibrated plans by student block.
        last: the last call's student blocks and their terms (L,), detached, whose mean is the loss.
    """

    temperature: float = 1.0
    layer_map: LayerMap = "uniform"
    divergence: Divergence = "forward_kl"
    pairing: Literal["adjacent", "matched"] | Plan = "adjacent"
    granularity: Granularity = "sample"
    merge: Merge = "progressive"
    coefficient: Coefficient = "closed_form"
    assignment: Literal["order", "optimal"] = "order"
    rows: float = 1.0
    coefficient_rows: Literal["all", "sampled"] = "all"
    timesteps: Sequence[int] | None = None
    chunk_rows: int | None = None
    compile: bool = False
    seed: int = 0
    plans: dict[str, Plan] = field(default_factory=dict, init=False)
    last: tuple[tuple[str, ...], Tensor] | None = field(default=None, init=False, repr=False, compare=False)
    _costs: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _squeezers: dict[str, tuple[Tensor, int, Plan, Squeezer]] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def from_config(cls, config: SHDConfig, seed: int = 0) -> SHDLoss:
        """The loss of a config; its weight and when it counts are `schedule_weight`'s."""
        options = config.model_dump(exclude={"weight", "decay", "every", "calibration_batches"})
        if config.pairing not in ("adjacent", "matched"):
            options["pairing"] = parse_plan(options["pairing"])
        return cls(**options, seed=seed)

    # --- the loss ----------------------------------------------------------------------------------------------

    def __call__(
        self,
        teacher_records: Records,
        student_records: Records,
        *,
        step: int = 0,
        timesteps: Tensor | None = None,
    ) -> Tensor:
        """The loss of one forward pass of both models, a scalar.

        Args:
            teacher_records: of the teacher's blocks by name, in execution order.
            student_records: of the student's, with the same samples.
            step: the training step, by which rows are drawn.
            timesteps: of the samples, (B,); needed where the term is limited to a range.

        Raises:
            ValueError: blocks that cannot be mapped, heads that cannot be squeezed, token grids that cannot be
                compared, or numbers that are not finite; the message names the block.
        """
        pairs = self.pairs(teacher_records, student_records)
        first = student_records[next(iter(pairs))]
        device, batch = first.query.device, first.query.shape[0]
        active = None
        if self.timesteps is not None:
            if timesteps is None:
                raise ValueError(
                    "a loss that is limited to a range of timesteps needs the timesteps of the samples"
                )
            active = within(timesteps, self.timesteps).to(device)
            if len(active) == batch:
                active = None
        terms = []
        with torch.autocast(device.type, enabled=False):
            for ours, theirs in pairs.items():
                teacher, student = (take(r, active) for r in (teacher_records[theirs], student_records[ours]))
                terms.append(self._term(ours, teacher, student, step).mean(1).sum() / batch)
        loss = torch.stack(terms) * self.temperature**2
        if not torch.compiler.is_compiling() and not torch.isfinite(loss).all():
            ours, theirs = list(pairs.items())[int((~torch.isfinite(loss)).nonzero()[0])]
            raise NonFiniteError(
                f"attention maps or values of block {ours} (teacher's {theirs}) are not finite"
            )
        self.last = tuple(pairs), loss.detach()
        return loss.mean()

    def pairs(self, teacher_records: Records, student_records: Records) -> dict[str, str]:
        """The teacher block of each student block that learns from one."""
        teacher = {name: record.kind for name, record in teacher_records.items()}
        student = {name: record.kind for name, record in student_records.items()}
        pairs = map_blocks(teacher, student, self.layer_map)
        if not pairs:
            raise ValueError(
                "no student block learns from a teacher block: nothing was captured, or the layer map is empty"
            )
        return pairs

    def _term(self, name: str, teacher: AttentionRecord, student: AttentionRecord, step: int) -> Tensor:
        """Divergences of one student block, (B, N)."""
        theirs, student, pool = self._prepare(name, teacher, student, step)
        divergence = DIVERGENCES[self.divergence]
        if self.assignment == "optimal":
            costs = assignment_costs(theirs.by_samples(), student, divergence, self.temperature, pool)
            theirs = replace(theirs, order=best_assignment(self._running(name, costs)))
        return map_divergence(student, theirs.by_samples(), divergence, self.temperature, pool, self.compile)

    def _prepare(
        self, name: str, teacher: AttentionRecord, student: AttentionRecord, step: int | None
    ) -> tuple[SqueezedTeacher, AttentionRecord, Pool]:
        """The teacher's squeezed maps and the student's record on a common grid; all rows where step is None."""
        of_teacher, of_student = common_grid(teacher, student)
        share = self.rows if step is not None else 1.0
        rows = sample_rows(len(of_student[0]), share, self.seed, step or 0, name)
        record, teacher_pool = on_grid(teacher, of_teacher, rows)
        estimated = rows is not None and self.granularity == "sample" and self.coefficient_rows == "all"
        theirs = SqueezedTeacher(
            record=record,
            source=teacher if estimated else record,
            squeezer=self._squeezer(name, teacher, student.heads),
            temperature=self.temperature,
            granularity=self.granularity,
            coefficient=self.coefficient,
            pool=teacher_pool,
            chunk_rows=self.chunk_rows,
        )
        return theirs, *on_grid(student, of_student, rows)

    def _squeezer(self, name: str, teacher: AttentionRecord, target: int) -> Squeezer:
        """The block's plan with the Gram matrices of its output weight, computed once for a frozen teacher.

        The weight of a sharded teacher is gathered anew for each pass, and so are they.
        """
        weight, plan = teacher.output_weight, self.plan(name, teacher.heads, target)
        known = self._squeezers.get(name)
        if known is not None:
            of, version, of_plan, squeezer = known
            if of.data_ptr() == weight.data_ptr() and version == weight._version and plan == of_plan:
                return squeezer
        check_plan(plan, teacher.heads, target)
        squeezer = prepare(plan, weight.to(teacher.query.device), teacher.heads, self.merge)
        self._squeezers[name] = weight, weight._version, plan, squeezer
        return squeezer

    def plan(self, name: str, heads: int, target: int) -> Plan:
        """The plan by which the teacher's heads are squeezed for a student block."""
        if self.pairing == "matched":
            if name not in self.plans:
                raise ValueError(f"no matched plan for block {name}: calibrate the loss, or load its plans")
            return self.plans[name]
        return plan_merges(heads, target) if self.pairing == "adjacent" else self.pairing

    def _running(self, name: str, costs: Tensor) -> Tensor:
        """The running mean of a block's assignment costs, these included unless they are not finite."""
        if not costs.isfinite().all():
            return self._costs.get(name, torch.zeros_like(costs))
        mean = costs / costs.mean().clamp_min(torch.finfo(costs.dtype).tiny)  # heads compare, not steps
        if name in self._costs:
            mean = torch.lerp(self._costs[name].to(mean), mean, 0.1)
        self._costs[name] = mean
        return mean

    # --- matched plans, state, explanation ---------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Iterable[tuple[Records, Records]]) -> dict[str, Plan]:
        """Find `plans` for `pairing="matched"` on a few batches of (teacher records, student records).

        Returns:
            The plan of each student block; `plans_to_json` writes them.
        """
        seen: dict[str, list[AttentionRecord]] = {}
        heads: dict[str, int] = {}
        for teacher_records, student_records in batches:
            for ours, theirs in self.pairs(teacher_records, student_records).items():
                seen.setdefault(ours, []).append(teacher_records[theirs])
                heads[ours] = student_records[ours].heads
        for name, records in seen.items():
            batches_of_block = [(map_stream(record), _float(record.value)) for record in records]
            weight = records[0].output_weight.to(records[0].query.device)
            strategy = self.granularity, self.merge, self.coefficient
            try:
                self.plans[name] = match_merges(batches_of_block, weight, heads[name], *strategy)
            except ValueError as error:
                raise ValueError(f"block {name}: {error}") from error
        return self.plans

    def state_dict(self) -> dict[str, Tensor]:
        """Running means of the optimal assignment by student block; empty where heads keep their order."""
        return dict(self._costs)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._costs = dict(state)

    @torch.no_grad()
    def explain(self, teacher_records: Records, student_records: Records) -> dict[str, Explanation]:
        """What the loss compares in each student block, on all query rows and samples: for the report."""
        found = {}
        for ours, theirs in self.pairs(teacher_records, student_records).items():
            teacher, student, pool = self._prepare(ours, teacher_records[theirs], student_records[ours], None)
            if self.assignment == "optimal" and ours in self._costs:
                teacher = replace(teacher, order=best_assignment(self._costs[ours]))
            found[ours] = explain(teacher, student, DIVERGENCES[self.divergence], pool)
        return found


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
