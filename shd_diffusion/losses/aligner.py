"""Align-to-Distill: a learned mixture of all the student's heads for each of the teacher's heads.

Source: Jin et al., "Align-to-Distill: Trainable Attention Alignment for Knowledge Distillation in Neural
Machine Translation" (LREC-COLING 2024): a pointwise convolution over the heads of all layers, so that neither
heads nor layers need to correspond. The published code leaves the convolution's weights free and takes a
softmax over whole maps of what comes out. Here the weights of each mixture are a softmax, so that an aligned
map is a distribution over keys in every row, and maps are compared as such. Extra parameters: teacher heads of
all blocks times student heads of all blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from shd_diffusion.attention import AttentionBlock, AttentionRecord
from shd_diffusion.config import TermConfig
from shd_diffusion.losses.baselines.captured import Baseline, Captured, running_blocks


class HeadAligner(Baseline):
    """Mean over samples, teacher heads and query rows of KL(teacher's map || mixture of the student's maps).

    Attributes:
        scores: by kind of attention, (teacher heads, student heads) over all blocks of that kind.
    """

    needs_records = True

    def __init__(self, config: TermConfig, teacher: ModelMixin, student: ModelMixin) -> None:
        super().__init__()
        theirs, ours = running_blocks(teacher), running_blocks(student)
        self.blocks = theirs.keys(), ours.keys()
        taught, learning = _heads(theirs), _heads(ours)
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
            target, maps = (
                _maps(part.records, blocks, kind)
                for part, blocks in zip((teacher, student), self.blocks, strict=True)
            )
            target = target.detach()
            mixed = torch.einsum("mn,bnqk->bmqk", self.weights(kind), maps)
            floor = torch.finfo(mixed.dtype).tiny  # below it a softmax has no value either
            pointwise = torch.xlogy(target, target) - target * mixed.clamp_min(floor).log()
            divergences.append(pointwise.sum(-1).mean())
        return torch.stack(divergences).mean()


def _heads(blocks: Mapping[str, AttentionBlock]) -> dict[str, int]:
    """Heads of all blocks by kind."""
    total: dict[str, int] = {}
    for block in blocks.values():
        total[block.kind] = total.get(block.kind, 0) + block.heads
    return total


def _maps(records: Mapping[str, AttentionRecord], blocks: Collection[str], kind: str) -> Tensor:
    """The maps of all heads of a kind, (B, heads, Q, K), of joint attention those of the main stream."""
    maps = [record.maps() for name, record in records.items() if name in blocks and record.kind == kind]
    if len({each.shape[2:] for each in maps}) > 1:
        raise ValueError("the aligner mixes heads of all blocks, and their token grids differ")
    return torch.cat(maps, dim=1)
