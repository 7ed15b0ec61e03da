"""Adaptive masks: features are compared where, and in the channels in which, learned masks say that it matters.

Source: Lan and Tian, "ACAM-KD: Adaptive and Cooperative Attention Masking for Knowledge Distillation" (ICCV 2025,
arXiv 2503.06307). The teacher's tokens attend to the student's, F = softmax(Q Kᵀ / √d) V with Q of the teacher, K and
V of the student behind its projector; M learned selection vectors a kind make of F masks over tokens, σ(F m), and
over channels, σ(w · mean of F's tokens). A mask's distance is the squared error weighed by it, over its sum; the term
is their mean, plus λ times the masks' mean Dice overlap, so that they choose different places. The published modules
are convolutions at a detector's scale; here they are linear maps of tokens. Extra parameters for each pair, C =
C_teacher: C_student · C + C, then C · (2d + C) for Q, K, V, and 2 M C for the selection.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from shd_diffusion.losses.features import FeatureTerm, tokens
from shd_diffusion.losses.term import MappedTermConfig, StepOutputs, TermConfig
from shd_diffusion.models.trace import Trace


class AdaptiveMasksConfig(MappedTermConfig):
    """M `masks` a kind, λ the weight of their `overlap`, d the `width` of queries and keys."""

    masks: int = Field(6, ge=2)
    overlap: float = Field(1.0, ge=0, allow_inf_nan=False)
    width: int = Field(32, ge=1)


class AdaptiveMasks(FeatureTerm):
    """Mean over pairs of the masked squared error of ||P(student) - teacher||², and λ times the masks' overlap."""

    Config: ClassVar[type[TermConfig]] = AdaptiveMasksConfig
    config: AdaptiveMasksConfig

    def __init__(
        self, config: AdaptiveMasksConfig, student: Trace, teacher: Trace | None, seed: int = 0
    ) -> None:
        super().__init__(config, student, teacher, seed)
        assert teacher is not None
        widths = (tokens(teacher.outputs[by]).shape[2] for by in self.pairs.values())
        self.masks = nn.ModuleList(Masks(width, config.width, config.masks) for width in widths)

    def forward(self, outputs: StepOutputs) -> Tensor:
        found = []
        for (student, target, counted), masks in zip(self.compared(outputs), self.masks, strict=True):
            of_tokens, of_channels = masks(student, target, counted)
            error = (student - target).square()  # (B, N, C)
            if counted is not None:
                of_tokens = of_tokens.masked_fill(~counted[:, None], -torch.inf)
                error = error * counted[..., None]
            number = student.shape[1] if counted is None else counted.sum(1)[:, None]
            # masks over their sums: softmax of their logarithms, since masks that learn to be small would be 0 / 0
            by_token = (of_tokens.softmax(2) * error.mean(2)[:, None]).sum(2)  # (B, M)
            by_channel = (of_channels.softmax(2) * (error.sum(1) / number)[:, None]).sum(2)
            distance = (by_token.mean() + by_channel.mean()) / 2
            overlap = dice(of_tokens) + dice(of_channels)
            found.append(distance + self.config.overlap * overlap)
        return torch.stack(found).mean()


class Masks(nn.Module):
    """From features of student and teacher, (B, N, C), to the logarithms of masks over tokens (B, M, N) and over
    channels (B, M, C)."""

    def __init__(self, channels: int, width: int, masks: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, width, bias=False)
        self.key = nn.Linear(channels, width, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.of_tokens, self.of_channels = (
            nn.Parameter(torch.randn(masks, channels) / channels**0.5) for _ in range(2)
        )

    def forward(self, student: Tensor, target: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        seen = None if counted is None else counted[:, None]
        fused = F.scaled_dot_product_attention(
            self.query(target), self.key(student), self.value(student), attn_mask=seen
        )
        weight = fused.new_ones(fused.shape[:2]) if counted is None else counted.to(fused)
        pooled = (fused * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)  # (B, C)
        return F.logsigmoid((fused @ self.of_tokens.T).mT), F.logsigmoid(pooled[:, None] * self.of_channels)


def dice(masks: Tensor) -> Tensor:
    """Mean over samples and pairs of different masks of 2 <a, b> / (<a, a> + <b, b>).

    A factor that a sample's masks have in common cancels, and is left out: masks of e⁻⁵⁰ overlap as any other.

    Args:
        masks: their logarithms, (B, M, n).
    """
    masks = (masks - masks.amax((1, 2), keepdim=True)).exp()
    products = masks @ masks.mT
    own = products.diagonal(dim1=1, dim2=2)
    overlap = 2 * products / (own[:, :, None] + own[:, None]).clamp_min(1e-30)
    number, itself = masks.shape[1], overlap.diagonal(dim1=1, dim2=2)
    return (overlap.sum((1, 2)) - itself.sum(1)).mean() / (number * (number - 1))
