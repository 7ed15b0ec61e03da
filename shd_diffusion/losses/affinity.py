"""Feature affinity: the similarities of a sample's tokens among each other, which need no projector.

Source: He et al., "Feature Affinity Assisted Knowledge Distillation and Quantization of Deep Neural Networks on
Label-Free Data" (arXiv 2302.10899): with tokens of length 1 as the rows of F, the mean over pairs of tokens of
(F_student F_studentᵀ - F_teacher F_teacherᵀ)², and its fast estimate: for M symmetric, ||M||² is the mean of ||M z||²
over z ~ N(0, I), and M z = F (Fᵀ z) takes no N×N. No extra parameters.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from shd_diffusion.losses.features import FeatureTerm
from shd_diffusion.losses.term import MappedTermConfig, StepOutputs, TermConfig
from shd_diffusion.models.trace import Trace
from shd_diffusion.randomness import generator


class AffinityConfig(MappedTermConfig):
    """Token similarities: of all pairs, or estimated by so many random `projections`, drawn by step and block."""

    projections: int | None = Field(None, ge=1)


class Affinity(FeatureTerm):
    """Mean over pairs of blocks, samples and pairs of tokens of (cos_student - cos_teacher)²."""

    Config: ClassVar[type[TermConfig]] = AffinityConfig
    config: AffinityConfig

    def __init__(self, config: AffinityConfig, student: Trace, teacher: Trace | None, seed: int = 0) -> None:
        super().__init__(config, student, teacher, seed)
        self.seed = seed

    def projector(self, student_width: int, teacher_width: int, tokens: int) -> nn.Module:
        return nn.Identity()

    def forward(self, outputs: StepOutputs) -> Tensor:
        found = []
        for place, (student, target, counted) in enumerate(self.compared(outputs)):
            drawn = None
            if self.config.projections is not None:
                source = generator(self.seed, "affinity", outputs.step, place)
                drawn = torch.randn(student.shape[1], self.config.projections, generator=source).to(student)
            found.append(affinity_gap(student, target, counted, drawn).mean())
        return torch.stack(found).mean()


def affinity_gap(
    student: Tensor, teacher: Tensor, counted: Tensor | None = None, drawn: Tensor | None = None
) -> Tensor:
    """Mean squared difference of the tokens' cosines by sample, (B,).

    Args:
        student: (B, N, C).
        teacher: (B, N, any).
        counted: which tokens count, (B, N); None for all.
        drawn: random vectors z, (N, projections); None for all pairs.
    """
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    if counted is not None:
        student, teacher = (each * counted[..., None] for each in (student, teacher))
    number = student.shape[1] if counted is None else counted.sum(1).clamp_min(1)
    if drawn is None:
        gap = student @ student.mT - teacher @ teacher.mT
        return gap.square().sum((1, 2)) / number**2
    gap = student @ (student.mT @ drawn) - teacher @ (teacher.mT @ drawn)
    return gap.square().sum(1).mean(1) / number**2
