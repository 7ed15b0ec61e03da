"""Align-to-Distill: a learned mixture of all the student's heads for each of the teacher's heads.

Source: Jin et al., "Align-to-Distill: Trainable Attention Alignment for Knowledge Distillation in Neural
Machine Translation" (LREC-COLING 2024): a pointwise convolution over the heads of all layers, so that neither
heads nor layers need to correspond. The published code leaves the convolution's weights free and takes a
softmax over whole maps of what comes out. Here the weights of each mixture are a softmax, so that an aligned
map is a distribution over keys in every row, and maps are compared as such. Extra parameters: teacher heads of
all blocks times student heads of all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.config import TermConfig
from shd_diffusion.losses.baselines.captured import Baseline, Captured, capturable_blocks


class HeadAligner(Baseline):
    """Mean over samples, teacher heads and query rows of KL(teacher's map || mixture of the student's maps).

    Attributes:
        scores: by kind of attention, (teacher heads, student heads) over all blocks of that kind.
    """

    needs_records = True

    def __init__(self, config: TermConfig, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        taught, learning = _heads(teacher), _heads(student)
        if missing := learning.keys() - taught.keys():
            raise ValueError(f"the teacher has no {missing.pop()}-attention for the student's to learn from")
        self.pairs = {}
        self.scores = nn.ParameterDict(
            {kind: torch.randn(taught[kind], heads) for kind, heads in learning.items()}
        )

    def weights(self, kind: str) -> Tensor:
        """(teacher heads, student heads); each row sums to 1."""
        return self.scores[kind].softmax(-1)

    def forward(self, teacher: Captured, student: Captured) -> Tensor:
        """See the class.

        Raises:
            ValueError: blocks of one kind whose token grids differ.
        """
        divergences = []
        for kind in self.scores:
            target, maps = _maps(teacher.records, kind).detach(), _maps(student.records, kind)
            mixed = torch.einsum("mn,bnqk->bmqk", self.weights(kind), maps)
            floor = torch.finfo(mixed.dtype).tiny  # below it a softmax has no value either
            pointwise = torch.xlogy(target, target) - target * mixed.clamp_min(floor).log()
            divergences.append(pointwise.sum(-1).mean())
        return torch.stack(divergences).mean()


def _heads(model: nn.Module) -> dict[str, int]:
    """Heads of all blocks by kind."""
    total: dict[str, int] = {}
    for block in capturable_blocks(model).values():
        total[block.kind] = total.get(block.kind, 0) + block.heads
    return total


def _maps(records: Mapping[str, AttentionRecord], kind: str) -> Tensor:
    """The maps of all heads of a kind, (B, heads, Q, K), of joint attention those of the main stream."""
    maps = {n: record.maps() for n, record in records.items() if record.kind == kind and ":" not in n}
    if len({each.shape[2:] for each in maps.values()}) > 1:
        raise ValueError("the aligner mixes heads of all blocks, and their token grids differ")
    return torch.cat([*maps.values()], dim=1)
