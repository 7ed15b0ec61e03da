"""Contrastive distillation: a sample's features should be told from those of the other samples of the batch.

A sample's feature in a block is the mean of its tokens, at length 1: s_i of the student, t_j of the teacher. Three
forms:

- `interactive`: mean over i of -log softmax_j(s_i·t_j / τ) at j = i; the student's feature is to find the teacher's
  of the same sample (Yang et al., "CLIP-KD", arXiv 2307.12732, ICL; with the samples of a batch as negatives, CRD's
  InfoNCE).
- `relational`: mean over i of KL(softmax_j(t_i·t_j / τ) || softmax_j(s_i·s_j / τ)) over the other samples j (CLIP-KD,
  CRD).
- `wasserstein`: Σ_ij π_ij (1 - s_i·t_j), π the entropic transport plan between both batches, a constant to the
  optimiser (Chen et al., "Wasserstein Contrastive Representation Distillation", arXiv 2012.08674, the local term
  LCKT).

The batch is what one process sees in one forward pass. Extra parameters: C_student · C_teacher + C_teacher for each
pair; `relational` has none.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from shd_diffusion.losses.features import FeatureTerm
from shd_diffusion.losses.padding import mean_of_rows
from shd_diffusion.losses.sinkhorn import transport_plan
from shd_diffusion.losses.term import MappedTermConfig, TermConfig


class ContrastiveConfig(MappedTermConfig):
    """The form, see the head of this file; `temperature` is τ, or ε of the transport plan."""

    form: Literal["interactive", "relational", "wasserstein"] = "interactive"
    temperature: float = Field(0.1, gt=0, allow_inf_nan=False)


class Contrastive(FeatureTerm):
    """Mean over pairs of blocks of a contrastive loss over the batch."""

    Config: ClassVar[type[TermConfig]] = ContrastiveConfig
    config: ContrastiveConfig

    @property
    def fewest_samples(self) -> int:
        return 3 if self.config.form == "relational" else 2

    def projector(self, student_width: int, teacher_width: int, tokens: int) -> nn.Module:
        if self.config.form == "relational":
            return nn.Identity()
        return super().projector(student_width, teacher_width, tokens)

    def distance(self, projected: Tensor, target: Tensor, counted: Tensor | None) -> Tensor:
        student, teacher = (  # (B, C)
            F.normalize(mean_of_rows(each.mT, counted), dim=-1) for each in (projected, target)
        )
        temperature = self.config.temperature
        match self.config.form:
            case "interactive":
                same = torch.arange(len(student), device=student.device)
                return F.cross_entropy(student @ teacher.T / temperature, same)
            case "relational":
                itself = torch.eye(len(student), dtype=torch.bool, device=student.device)
                target, own = (
                    (each @ each.T / temperature).masked_fill(itself, -1e9).log_softmax(-1)
                    for each in (teacher, student)
                )
                return F.kl_div(own, target, reduction="batchmean", log_target=True)
            case "wasserstein":
                cost = 1 - student @ teacher.T
                return (transport_plan(cost, temperature) * cost).sum()
