"""Norm and direction: a token's feature should point where the teacher's does, and be at least as long.

Source: Wang et al., "Improving Knowledge Distillation via Regularizing Feature Norm and Direction" (arXiv
2305.17007): 1 - s·e / max(||s||, ||t||) with e the direction of the teacher's mean feature of the image's class. A
denoiser's features differ by place and noise more than by class, and prompts have none, so here e is the direction of
the teacher's own token: the term is 1 - cos(s, t) · min(1, ||s|| / ||t||). Extra parameters: C_student · C_teacher +
C_teacher for each pair.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from shd_diffusion.losses.features import FeatureTerm
from shd_diffusion.losses.padding import mean_of_rows


class NormDirection(FeatureTerm):
    """Mean over pairs, samples and tokens of 1 - s·e / max(||s||, ||t||), s behind a linear projector."""

    def distance(self, projected: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        along = (projected * F.normalize(target, dim=-1)).sum(-1)
        longest = projected.norm(dim=-1).maximum(target.norm(dim=-1)).clamp_min(1e-8)
        return mean_of_rows(1 - along / longest, counted).mean()
