"""What a term of the loss is: a function of one step's outputs, with what it needs captured.

Denoising, output KD, SHD and every loss that SHD is compared with are terms; `TERMS` in this room's __init__ lists
them. A new one is a file with a `Term` and its options, and a line there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field, FiniteFloat, model_validator
from torch import Tensor, nn

from shd_diffusion.attention import AttentionRecord, Kind
from shd_diffusion.losses.choice import Stream, choose_pairs
from shd_diffusion.losses.weight_schedule import Decay, schedule_weight
from shd_diffusion.models.denoiser import Condition
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.trace import Trace
from shd_diffusion.section import Section

Records = Mapping[str, AttentionRecord]


class NonFiniteError(ValueError):
    """Numbers that are not finite where a term needs them to be; the message names the block."""


class TermConfig(Section):
    """One summand of the loss. Weight 0 leaves the term out: it is neither computed nor logged.

    `during` limits it to a part of the run, from one share of `train.max_steps` up to another: features in [0, 0.5] and
    the outputs in [0.5, 1] make the two stages of FitNets, where the student's blocks learn before its output does.
    `decay` lets its weight go to 0 over the run.
    """

    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    decay: Decay = "constant"
    during: list[FiniteFloat] | None = Field(None, min_length=2, max_length=2)

    @model_validator(mode="after")
    def _during_is_a_part(self) -> TermConfig:
        if self.during is not None and not 0 <= self.during[0] < self.during[1] <= 1:
            raise ValueError(
                f"`during` is {self.during}: give the shares of the run at which it begins and ends"
            )
        return self


class MappedTermConfig(TermConfig):
    """A term on pairs of blocks.

    Attributes:
        layer_map: which teacher block each student block learns from, see `map_blocks`.
        kinds: of attention that count; None for all that both models have.
        streams: of joint attention, whose query rows count, the image's or the text's; None for both.
        after: share of the student's mapped blocks, in order of depth, that is left out at the start: with 0.5 the
            later half counts.
    """

    layer_map: Literal["uniform", "last", "first"] | list[int | None] | dict[str, str] = "uniform"
    kinds: list[Kind] | None = Field(None, min_length=1)
    streams: list[Stream] | None = Field(None, min_length=1)
    after: float = Field(0.0, ge=0, lt=1)


@dataclass(frozen=True)
class Batch:
    """Noised samples: clean, noise and noised (B, C, H, W), timesteps (B,), condition (B, ...) by argument.

    Where passes are masked, `mask` is what is added to the condition of the second pass (MDTv2's `ids_keep`). `null` is
    what stands for no condition, (1, ...) by argument. Terms with a teacher see one of `mixed` instead, if it has any.
    """

    clean: Tensor
    noise: Tensor
    noised: Tensor
    timesteps: Tensor
    condition: Condition
    mask: Condition = field(default_factory=dict)
    null: Condition = field(default_factory=dict)
    mixed: tuple[Batch, ...] = ()


@dataclass(frozen=True)
class Captured:
    """Of one model's forward pass: attention records by block, and outputs by name, see `OutputCapture`."""

    records: Records = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    def detached(self) -> Captured:
        """The same without the graph that leads to it."""
        return Captured(
            {name: record.detached() for name, record in self.records.items()},
            {name: output.detach() for name, output in self.outputs.items()},
        )

    def to(self, device: torch.device) -> Captured:
        """The same on another device."""
        return Captured(
            {name: record.to(device) for name, record in self.records.items()},
            {name: output.to(device) for name, output in self.outputs.items()},
        )


@dataclass(frozen=True)
class StepOutputs:
    """One pass of teacher and student on the same batch.

    Attributes:
        process: by which the batch was noised.
        batch: what both models saw.
        prediction: the student's, (B, C or 2C, H, W), with its graph.
        teacher_prediction: the same of the teacher; None where no term needs it.
        teacher_null_prediction: the teacher's without any condition; None where no term needs it.
        student: what was captured of the student.
        teacher: what was captured of the teacher.
        step: counted from 0.
    """

    process: ForwardProcess
    batch: Batch
    prediction: Tensor
    teacher_prediction: Tensor | None = None
    student: Captured = field(default_factory=Captured)
    teacher: Captured = field(default_factory=Captured)
    step: int = 0
    teacher_null_prediction: Tensor | None = None

    @property
    def channels(self) -> int:
        """C, the channels that are denoised; what a model predicts beyond them is a variance."""
        return self.batch.clean.shape[1]


class Term(nn.Module):
    """One summand of the loss; a module, since some have parameters, which train with the student and stay behind.

    Built from its options and what a pass of the student and of the teacher looks like (`Trace`; the teacher's is None
    where a model is trained without one). Called with a step's outputs it gives a scalar, the mean over the samples.
    Only the student and the term's own parameters receive gradients.

    Attributes:
        Config: its options, a section of `losses`.
        default_weight: its weight where the config does not name the term.
        needs_teacher: whether it makes sense with a teacher only.
        reaches_output: whether its gradient goes through the student's prediction, and so to all parameters.
        captures: `records` or `outputs` of the blocks or modules in `pairs`, if it looks inside the models.
        pairs: student block or module -> the teacher's.
        rows: student output -> the record whose query rows are its tokens, where not all of these may count.
    """

    Config: ClassVar[type[TermConfig]] = TermConfig
    default_weight: ClassVar[float] = 0.0
    needs_teacher: ClassVar[bool] = True
    reaches_output: ClassVar[bool] = False
    captures: ClassVar[Literal["records", "outputs"] | None] = None
    pairs: Mapping[str, str]
    rows: Mapping[str, str]

    def __init__(self, config: TermConfig, student: Trace, teacher: Trace | None, seed: int = 0) -> None:
        """Raises ValueError: it cannot be computed for these models."""
        super().__init__()
        self.config, self.pairs, self.rows = config, {}, {}

    @classmethod
    def applies(cls, student: Trace) -> bool:
        """Whether it has anything to say of such a model; if not, it is left out whatever its weight."""
        return True

    @property
    def needs_null_prediction(self) -> bool:
        """Whether the teacher is to predict without the condition too, which takes one more of its passes."""
        return False

    @property
    def fewest_samples(self) -> int:
        """So many samples a pass must have, for the term to compare them with one another."""
        return 1

    @property
    def looks_at(self) -> tuple[Collection[str], Collection[str]]:
        """The student's and the teacher's blocks or modules that are to be captured."""
        return self.pairs.keys(), self.pairs.values()

    def weight(self, step: int, max_steps: int) -> float:
        """At a step, counted from 0; 0 where the term need not be computed."""
        first, last = self.config.during or (0, 1)
        if not first <= step / max(max_steps, 1) < last:
            return 0.0
        return schedule_weight(self.config.weight, step, max_steps, self.config.decay)

    def forward(self, outputs: StepOutputs) -> Tensor:
        raise NotImplementedError


def map_records(student: Records, teacher: Records, config: MappedTermConfig) -> dict[str, str]:
    """The teacher's record of each of the student's that learns from one, see `choose_pairs`.

    Raises:
        ValueError: they cannot be mapped, or no block is left.
    """
    of_teacher, of_student = ({n: r.kind for n, r in records.items()} for records in (teacher, student))
    return choose_pairs(of_teacher, of_student, config.layer_map, config.kinds, config.streams, config.after)


def map_traces(student: Trace, teacher: Trace | None, config: MappedTermConfig) -> dict[str, str]:
    """As `map_records`, of what a pass of each model leaves."""
    if teacher is None:
        raise ValueError("there is no teacher")
    return map_records(student.records, teacher.records, config)


def map_modules(pairs: Mapping[str, str], module: Callable[[str], str]) -> dict[str, str]:
    """The teacher's module of each of the student's, from pairs of records and the module of a record's name.

    Where a module has several records, its first one decides.
    """
    modules: dict[str, str] = {}
    for name, by in pairs.items():
        modules.setdefault(module(name), module(by))
    return modules
