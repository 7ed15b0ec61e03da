"""VkD: block outputs through an orthogonal projector against normalised features of the teacher.

Source: Miles, Elezi, Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections" (CVPR 2024):
an orthogonal projection keeps the student's features as they are among each other, so that the student
learns and not the projector; the teacher's features are whitened for generation, standardised for
classification. The distance is the smooth L1 of the published code, which pools the tokens first; here every
token counts. Extra parameters: C_student · C_teacher for each pair of outputs.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from shd_diffusion.losses.features import FeatureTerm
from shd_diffusion.losses.padding import mean_of_rows
from shd_diffusion.losses.term import MappedTermConfig, TermConfig
from shd_diffusion.models.trace import Trace

EPSILON = 1e-5  # on a variance, of features whose scale is about 1


class VkDConfig(MappedTermConfig):
    """VkD: features of the teacher are whitened (for generation) or standardised (for classification)."""

    normalisation: Literal["whiten", "standardise"] = "whiten"


class VkD(FeatureTerm):
    """Mean over pairs of the smooth L1 distance between P(student) and the normalised teacher.

    P has orthonormal rows, one a student's channel (orthonormal columns where the student is wider).
    """

    Config: ClassVar[type[TermConfig]] = VkDConfig

    def __init__(self, config: VkDConfig, student: Trace, teacher: Trace | None, seed: int = 0) -> None:
        super().__init__(config, student, teacher, seed)
        self.normalise = {"whiten": whiten, "standardise": standardise}[config.normalisation]

    def projector(self, student_width: int, teacher_width: int, tokens: int) -> nn.Module:
        # The paper's map. PyTorch's default for matrices that are not square, `householder`, turns columns to 0 when
        # an optimiser moves the diagonal, which weight decay does in its first step.
        linear = nn.Linear(student_width, teacher_width, bias=False)
        return orthogonal(linear, orthogonal_map="matrix_exp", use_trivialization=False)

    def distance(self, projected: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        gap = F.smooth_l1_loss(projected, self.normalise(target, counted), reduction="none")
        return mean_of_rows(gap.mean(-1), counted).mean()


def standardise(features: Tensor, counted: Tensor | None = None) -> Tensor:
    """Each token with mean 0 and variance 1 over its channels."""
    return F.layer_norm(features, features.shape[-1:], eps=EPSILON)


def whiten(features: Tensor, counted: Tensor | None = None) -> Tensor:
    """Channels with mean 0 and the identity as covariance over a batch's tokens: the least change (ZCA).

    The batch is what one process sees in one forward pass, so the loss depends on how a step is dealt out.
    Directions in which the batch does not vary stay near 0.

    Args:
        features: (B, N, C).
        counted: which tokens count, (B, N); None for all.
    """
    known = features.flatten(0, -2) if counted is None else features[counted]
    mean = known.mean(0)
    values, vectors = torch.linalg.eigh((known - mean).T @ (known - mean) / len(known))
    scale = (values.clamp_min(0) + EPSILON * values.max()).rsqrt()
    return (features - mean) @ (vectors * scale) @ vectors.T
