"""The Squeezing-Heads Distillation loss (docs/method.md sections 3 to 6; Bing et al., arXiv 2502.07436)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.divergence import DIVERGENCES, Divergence
from shd_diffusion.losses.inspect_loss import Inspection, inspect_block
from shd_diffusion.losses.map_divergence import SqueezedTeacher, map_divergence, map_stream
from shd_diffusion.losses.padding import alike, estimates_all
from shd_diffusion.losses.sinkhorn import check_grid
from shd_diffusion.losses.term import (
    MappedTermConfig,
    NonFiniteError,
    Records,
    StepOutputs,
    Term,
    TermConfig,
    map_records,
    map_traces,
)
from shd_diffusion.losses.token_grid import Pool, common_grid, on_grid, sample_rows, take
from shd_diffusion.losses.weight_schedule import within
from shd_diffusion.models.trace import Trace
from shd_diffusion.operations import is_readable
from shd_diffusion.squeezing.coefficients import Coefficient
from shd_diffusion.squeezing.matching import match_merges
from shd_diffusion.squeezing.merge_weights import Granularity, Squeezer, prepare_squeezer
from shd_diffusion.squeezing.plan import (
    BlockPlan,
    Merge,
    Plan,
    check_merge,
    check_plan,
    parse_plan,
    plan_merges,
)


class SHDConfig(MappedTermConfig):
    """Options of SHD; the defaults are the paper's method.

    Attributes:
        temperature: τ, softens both maps.
        divergence: of the squeezed map and the student's; `sinkhorn` of self-attention over a square grid alone.
        pairing: `adjacent`, `matched` (call `calibrate` first, or set `plans`), or one plan for all blocks; None: by
            `plans` where there are some, as of a student that was squeezed by them, else `adjacent`.
        granularity: one coefficient a `sample`, or one a query `row`.
        merge: `progressive`, pair by pair, or `joint`, a final group at once.
        coefficient: `closed_form`, or for ablations `mean` or `select`.
        calibration_batches: on which matched pairs are found.
        rows: share of query rows taken, drawn by step and block.
        coefficient_rows: with rows < 1, take sample-wise coefficients from `all` rows, which leaves the loss an
            unbiased estimate, or from the `sampled` ones, which is cheaper.
        timesteps: first and last timestep at which the term counts; samples outside add 0 to the mean.
        every: the term counts at every so many steps only.
        chunk_rows: query rows, counted over samples, whose maps may exist at once; None leaves it to the device.
        compile: have `torch.compile` fuse the work on the maps. On a CPU that takes a C++ compiler; where maps come
            in many chunks, it takes long.
    """

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    divergence: Divergence = "forward_kl"
    pairing: Literal["adjacent", "matched"] | list[list[list[int]]] | None = None
    granularity: Granularity = "sample"
    merge: Merge = "progressive"
    coefficient: Coefficient = "closed_form"
    calibration_batches: int = Field(4, ge=1)
    rows: float = Field(1.0, gt=0, le=1)
    coefficient_rows: Literal["all", "sampled"] = "all"
    timesteps: list[int] | None = Field(None, min_length=2, max_length=2)
    every: int = Field(1, ge=1)
    chunk_rows: int | None = Field(None, ge=1)
    compile: bool = False

    @model_validator(mode="after")
    def _timesteps_are_a_range(self) -> SHDConfig:
        if self.timesteps is not None and self.timesteps[0] > self.timesteps[1]:
            raise ValueError(
                f"`timesteps` {self.timesteps} end before they begin; give the first and the last"
            )
        return self


class SHDLoss:
    """Mean over blocks, samples, heads and query rows of τ² · divergence(squeezed teacher map, student map).

    Query rows of padding count in no mean, and in no coefficient; keys that a mask hides carry no attention.

    Nothing about the teacher receives a gradient; the student's queries and keys do. Maps are computed in float32 or
    better, chunk by chunk.

    Args:
        config: the options; its weight, and when it counts, are the caller's affair.
        seed: of the sampled rows.

    Attributes:
        plans: by student block, those that were calibrated, or that the student was squeezed by.
        last: the last call's student blocks and their terms (L,), detached, whose mean is the loss.
    """

    def __init__(self, config: SHDConfig | None = None, seed: int = 0) -> None:
        self.config, self.seed = config or SHDConfig(), seed
        self.plans: dict[str, BlockPlan] = {}
        self.last: tuple[tuple[str, ...], Tensor] | None = None
        self._squeezers: dict[str, tuple[Tensor, int, Plan, Squeezer]] = {}

    def __call__(
        self,
        teacher_records: Records,
        student_records: Records,
        *,
        step: int = 0,
        timesteps: Tensor | None = None,
        size: tuple[int, ...] | None = None,
    ) -> Tensor:
        """The loss of one forward pass of both models, a scalar.

        Args:
            teacher_records: of the teacher's blocks by name, in execution order.
            student_records: of the student's, with the same samples.
            step: the training step, by which rows are drawn.
            timesteps: of the samples, (B,); needed where the term is limited to a range.
            size: height and width of what was denoised; needed where it is not square, and the models have other
                token grids.

        Raises:
            ValueError: a model that was not run, blocks that cannot be mapped, heads that cannot be squeezed, token
                grids that cannot be compared, or numbers that are not finite; the message names the model or block.
        """
        for whose, records in (("teacher", teacher_records), ("student", student_records)):
            if not records:
                raise ValueError(
                    f"there are no records of the {whose}: run it inside its AttentionCapture before the loss"
                )
        pairs = self.pairs(teacher_records, student_records)
        if not pairs:
            raise ValueError(
                "no block of the student learns from one of the teacher; see to `layer_map` and `kinds`"
            )
        first = student_records[next(iter(pairs))]
        device, batch = first.query.device, first.query.shape[0]
        active = self._active(timesteps, device, batch)
        terms = []
        with torch.autocast(device.type, enabled=False):
            for name, by in pairs.items():
                teacher, student = teacher_records[by], student_records[name]
                counts = teacher.query.shape[0], student.query.shape[0]
                if counts[0] != counts[1]:
                    raise ValueError(
                        f"block {name}: the teacher saw {counts[0]} samples in its {by}, the student {counts[1]}; run "
                        "both on the same batch"
                    )
                teacher, student = take(teacher, active), take(student, active)
                terms.append(self._divergences(name, teacher, student, step, size).mean(1).sum() / batch)
        loss = torch.stack(terms) * self.config.temperature**2
        if is_readable(loss) and not torch.isfinite(loss).all():
            name, by = list(pairs.items())[int((~torch.isfinite(loss)).nonzero()[0])]
            raise NonFiniteError(f"attention maps or values of block {name} (teacher's {by}) are not finite")
        self.last = tuple(pairs), loss.detach()
        return loss.mean()

    def pairs(self, teacher_records: Records, student_records: Records) -> dict[str, str]:
        """The teacher block of each student block that learns from one."""
        return map_records(student_records, teacher_records, self.config)

    def _active(self, timesteps: Tensor | None, device: torch.device, batch: int) -> Tensor | None:
        """Indices of the samples that count; None where all do."""
        if self.config.timesteps is None:
            return None
        if timesteps is None:
            raise ValueError(
                "a loss that is limited to a range of timesteps needs the timesteps of the samples"
            )
        active = within(timesteps, self.config.timesteps).to(device)
        return None if len(active) == batch else active

    def _divergences(
        self,
        name: str,
        teacher: AttentionRecord,
        student: AttentionRecord,
        step: int,
        size: tuple[int, ...] | None,
    ) -> Tensor:
        """Of one student block, (B, N)."""
        targets, drawn, pool = self._prepare(name, teacher, student, step, size)
        divergence, config = DIVERGENCES[self.config.divergence], self.config
        found = map_divergence(
            drawn, targets.by_samples(), divergence, config.temperature, pool, config.compile
        )
        return found * estimates_all(alike(teacher, student)[1], drawn, found.dtype)

    def _prepare(
        self,
        name: str,
        teacher: AttentionRecord,
        student: AttentionRecord,
        step: int | None,
        size: tuple[int, ...] | None = None,
    ) -> tuple[SqueezedTeacher, AttentionRecord, Pool]:
        """The teacher's squeezed maps and the student's record on a common grid; all rows where step is None."""
        config = self.config
        teacher, student = alike(teacher, student)
        of_teacher, of_student = common_grid(teacher, student, size)
        share = config.rows if step is not None else 1.0
        rows = sample_rows(len(of_student[0]), share, self.seed, step or 0, name)
        record, teacher_pool = on_grid(teacher, of_teacher, rows)
        estimated = rows is not None and config.granularity == "sample" and config.coefficient_rows == "all"
        targets = SqueezedTeacher(
            record=record,
            source=teacher if estimated else record,
            squeezer=self._squeezer(name, teacher, student.heads),
            temperature=config.temperature,
            granularity=config.granularity,
            coefficient=config.coefficient,
            pool=teacher_pool,
            chunk_rows=config.chunk_rows,
        )
        return targets, *on_grid(student, of_student, rows)

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
        squeezer = prepare_squeezer(plan, weight.to(teacher.query.device), teacher.heads, self.config.merge)
        self._squeezers[name] = weight, weight._version, plan, squeezer
        return squeezer

    def plan(self, name: str, heads: int, target: int) -> Plan:
        """The plan by which the teacher's heads are squeezed for a student block."""
        pairing, block = self.config.pairing, name.partition(":")[0]  # whose streams share its heads
        known = self.plans.get(name, self.plans.get(block))
        if known is not None and pairing in (None, "matched"):
            return known.plan
        if pairing == "matched":
            raise ValueError(f"no matched plan for block {name}: calibrate the loss, or load its plans")
        return parse_plan(pairing) if isinstance(pairing, list) else plan_merges(heads, target)

    # --- matched plans, and what the loss compares -------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, batches: Iterable[tuple[Records, Records]]) -> dict[str, BlockPlan]:
        """Find `plans` for `pairing="matched"` on a few batches of (teacher records, student records).

        Returns:
            The plan of each student block; `plans_to_json` writes them.
        """
        seen: dict[str, list[AttentionRecord]] = {}
        heads: dict[str, int] = {}
        pairs: dict[str, str] = {}
        for teacher_records, student_records in batches:
            pairs = self.pairs(teacher_records, student_records)
            for name, by in pairs.items():
                seen.setdefault(name, []).append(teacher_records[by])
                heads[name] = student_records[name].heads
        for name, records in seen.items():
            batches_of_block = [(map_stream(record), _float(record.value)) for record in records]
            weight = records[0].output_weight.to(records[0].query.device)
            strategy = self.config.granularity, self.config.merge, self.config.coefficient
            try:
                plan = match_merges(batches_of_block, weight, heads[name], *strategy)
            except ValueError as error:
                raise ValueError(f"block {name}: {error}") from error
            self.plans[name] = BlockPlan(plan, pairs[name])
        return self.plans

    @torch.no_grad()
    def inspect(
        self, teacher_records: Records, student_records: Records, size: tuple[int, ...] | None = None
    ) -> Iterator[tuple[str, Inspection]]:
        """What the loss compares in each student block, by its name, on all query rows and samples: for the report.

        The maps of a block are many: it is best let go before the next one.
        """
        for name, by in self.pairs(teacher_records, student_records).items():
            teacher, student, pool = self._prepare(
                name, teacher_records[by], student_records[name], None, size
            )
            yield name, inspect_block(teacher, student, DIVERGENCES[self.config.divergence], pool)


class SHD(Term):
    """SHDLoss as a term: on the records of the mapped blocks, at every so many steps."""

    Config: ClassVar[type[TermConfig]] = SHDConfig
    default_weight = 1.0
    captures = "records"
    config: SHDConfig

    def __init__(self, config: SHDConfig, student: Trace, teacher: Trace | None, seed: int = 0) -> None:
        super().__init__(config, student, teacher, seed)
        self.pairs = map_traces(student, teacher, config)
        chosen = {"layer_map": self.pairs, "kinds": None, "streams": None, "after": 0.0}
        self.loss = SHDLoss(config.model_copy(update=chosen), seed)
        assert teacher is not None
        self.heads = {
            name: (teacher.records[by].heads, student.records[name].heads) for name, by in self.pairs.items()
        }
        for name, by in self.pairs.items():
            heads = self.heads[name]
            try:
                plan = plan_merges(*heads) if config.pairing == "matched" else self.loss.plan(name, *heads)
                check_plan(plan, *heads)
                check_merge(plan, config.merge)
                _, (_, keys) = common_grid(teacher.records[by], student.records[name], student.shape[-2:])
                if config.divergence == "sinkhorn":
                    check_grid(len(keys), student.records[name].kind)
            except ValueError as error:
                raise ValueError(f"block {name}: {error}") from error

    def take_plans(self, plans: Mapping[str, BlockPlan]) -> None:
        """Squeeze by the plans that the student's own heads were merged by, unless another pairing is asked for.

        Args:
            plans: by student block.

        Raises:
            ValueError: the teacher has other heads than those that merged, or a block learns from another than the one
                whose heads merged into its own.
        """
        for name, heads in self.heads.items():
            known, by = plans.get(name.partition(":")[0]), self.pairs[name].partition(":")[0]
            if known is None or self.config.pairing is not None:
                continue
            if known.teacher not in (None, by):
                raise ValueError(
                    f"block {name} has merged heads of the teacher's {known.teacher} and learns from {by}; give "
                    "`layer_map` the blocks that stayed, or set `adjacent` or `matched`"
                )
            try:
                check_plan(known.plan, *heads)
            except ValueError as error:
                raise ValueError(
                    f"the student was squeezed from another teacher: block {name}: {error}; set `adjacent` or `matched`"
                ) from error
        self.loss.plans = dict(plans)

    def weight(self, step: int, max_steps: int) -> float:
        # the last of every so many steps, as it is the last of `log_every` that is logged
        return 0.0 if (step + 1) % self.config.every else super().weight(step, max_steps)

    def forward(self, outputs: StepOutputs) -> Tensor:
        batch = outputs.batch
        return self.loss(
            outputs.teacher.records,
            outputs.student.records,
            step=outputs.step,
            timesteps=batch.timesteps,
            size=tuple(batch.clean.shape[-2:]),
        )


def _float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
