"""Feature distillation: the student's block outputs through a linear projector against the teacher's.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), with the linear projector of the SHD
paper's comparison. Extra parameters: C_student · C_teacher + C_teacher for each mapped block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F

from shd_diffusion.config import MappedTermConfig
from shd_diffusion.losses.baselines.captured import (
    Baseline,
    Captured,
    enclosing_block,
    map_attention,
    tokens,
    width,
)


class FeatureDistillation(Baseline):
    """Mean over mapped blocks of ||P(student) - teacher||², averaged over samples, tokens and channels.

    Attributes:
        projectors: P by pair, in the order of `pairs`.
    """

    def __init__(self, config: MappedTermConfig, teacher: ModelMixin, student: ModelMixin) -> None:
        super().__init__()
        pairs = map_attention(teacher, student, config.layer_map)
        # a block with several attention modules is matched once
        modules = {self.module(ours): (ours, theirs) for ours, theirs in pairs.items()}
        self.pairs = {name: self.module(theirs) for name, (_, theirs) in modules.items()}
        self.projectors = nn.ModuleList(
            self.projector(width(student, ours), width(teacher, theirs)) for ours, theirs in modules.values()
        )

    def module(self, attention: str) -> str:
        """The module whose output is matched, by the attention module in it."""
        return enclosing_block(attention)

    def projector(self, of_student: int, of_teacher: int) -> nn.Module:
        """From the student's width to the teacher's."""
        return nn.Linear(of_student, of_teacher)

    def distance(self, projected: Tensor, target: Tensor) -> Tensor:
        """Of features (B, N, C): a scalar."""
        return F.mse_loss(projected, target)

    def forward(self, teacher: Captured, student: Captured) -> Tensor:
        """See the class.

        Raises:
            ValueError: a pair whose numbers of tokens differ.
        """
        distances = []
        for (ours, theirs), projector in zip(self.pairs.items(), self.projectors, strict=True):
            features, target = matched_tokens(student.outputs, ours, teacher.outputs, theirs)
            distances.append(self.distance(projector(features), target))
        return torch.stack(distances).mean()


def matched_tokens(
    student: Mapping[str, Tensor], ours: str, teacher: Mapping[str, Tensor], theirs: str
) -> tuple[Tensor, Tensor]:
    """The tokens of a pair, (B, N, C_student) and (B, N, C_teacher), the teacher's without gradients.

    Raises:
        ValueError: their numbers of tokens differ.
    """
    features, target = tokens(student[ours]), tokens(teacher[theirs]).detach()
    if features.shape[1] != target.shape[1]:
        raise ValueError(
            f"{ours} has {features.shape[1]} tokens, the teacher's {theirs} {target.shape[1]}: "
            "features are compared token by token; choose models of the same grid"
        )
    return features, target
