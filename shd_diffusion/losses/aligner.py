"""Align-to-Distill: a learned mixture of all the student's heads for each of the teacher's heads.

Source: Jin et al., "Align-to-Distill: Trainable Attention Alignment for Knowledge Distillation in Neural
Machine Translation" (LREC-COLING 2024): a pointwise convolution over the heads of all layers, so that neither
heads nor layers need to correspond. The published code leaves the convolution's weights free and takes a
softmax over whole maps of what comes out. Here the weights of each mixture are a softmax, so that an aligned
map is a distribution over keys in every row, and maps are compared as such. Extra parameters: teacher heads of
all blocks times student heads of all blocks.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import reduce

import torch
from torch import Tensor, nn

from shd_diffusion.losses.padding import mean_of_rows
from shd_diffusion.losses.term import Records, StepOutputs, Term, TermConfig
from shd_diffusion.models.trace import Trace


class HeadAligner(Term):
    """Mean over samples, teacher heads and query rows that count of KL(teacher's map || mixture of the student's maps).

    Attributes:
        scores: by kind of attention, (teacher heads, student heads) over all blocks of that kind.
    """

    captures = "records"

    def __init__(self, config: TermConfig, student: Trace, teacher: Trace | None, seed: int = 0) -> None:
        super().__init__(config, student, teacher, seed)
        if teacher is None:
            raise ValueError("there is no teacher")
        student_heads, teacher_heads = _heads(student.records), _heads(teacher.records)
        if missing := student_heads.keys() - teacher_heads.keys():
            raise ValueError(f"the teacher has no {missing.pop()}-attention for the student's to learn from")
        self.scores = nn.ParameterDict(
            {kind: torch.randn(teacher_heads[kind], heads) for kind, heads in student_heads.items()}
        )
        for kind in self.scores:  # raises where the grids differ
            shapes = {tuple(_maps(part.records, kind).shape[2:]) for part in (student, teacher)}
            if len(shapes) > 1:
                raise ValueError(
                    f"the aligner compares maps of {kind}-attention, and their token grids differ"
                )
        self._blocks = student.records.keys(), teacher.records.keys()

    @property
    def looks_at(self) -> tuple[Collection[str], Collection[str]]:
        return self._blocks

    def weights(self, kind: str) -> Tensor:
        """(teacher heads, student heads); each row sums to 1."""
        return self.scores[kind].softmax(-1)

    def forward(self, outputs: StepOutputs) -> Tensor:
        """See the class.

        Raises:
            ValueError: blocks of one kind whose token grids differ.
        """
        divergences = []
        for kind in self.scores:
            target = _maps(outputs.teacher.records, kind).detach()
            maps = _maps(outputs.student.records, kind)
            mixed = torch.einsum("mn,bnqk->bmqk", self.weights(kind), maps)
            floor = torch.finfo(mixed.dtype).tiny  # below it a softmax has no value either
            pointwise = torch.xlogy(target, target) - target * mixed.clamp_min(floor).log()
            counted = _counted(outputs.student.records, kind)
            divergences.append(mean_of_rows(pointwise.sum(-1), counted).mean())
        return torch.stack(divergences).mean()


def _main_streams(records: Records) -> Records:
    """Of joint attention the rows of the image."""
    return {name: record for name, record in records.items() if ":" not in name}


def _heads(records: Records) -> dict[str, int]:
    """Heads of all blocks by kind."""
    total: dict[str, int] = {}
    for record in _main_streams(records).values():
        total[record.kind] = total.get(record.kind, 0) + record.heads
    return total


def _maps(records: Records, kind: str) -> Tensor:
    """The maps of all heads of a kind, (B, heads, Q, K)."""
    maps = [record.maps() for record in _main_streams(records).values() if record.kind == kind]
    if len({one.shape[2:] for one in maps}) > 1:
        raise ValueError("the aligner mixes heads of all blocks, and their token grids differ")
    return torch.cat(maps, dim=1)


def _counted(records: Records, kind: str) -> Tensor | None:
    """The query rows that count in all blocks of a kind, (B, Q); None where all do."""
    of_kind = (record.counted for record in _main_streams(records).values() if record.kind == kind)
    return reduce(torch.logical_and, known) if (known := [c for c in of_kind if c is not None]) else None
