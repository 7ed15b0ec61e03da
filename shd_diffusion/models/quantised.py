"""Students that compute as if in 8 bits while they train (quantisation-aware training, Jacob et al. 2018).

Every linear layer rounds the rows of its weight and the tokens that enter it to 255 even steps,

    q(x) = s · round(x / s),    s = max |x| / 127    row by row,

the vector-wise absmax scheme of LLM.int8() (Dettmers et al. 2022, section 3.1) without its outliers. Nothing is cut
off, so the gradient goes straight through. What such students learn by: Kim et al. 2022, "Understanding and Improving
Knowledge Distillation for Quantization Aware Training of Large Transformer Encoders".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def on_grid(rows: Tensor) -> Tensor:
    """Rows (..., C), each rounded to 255 steps between ± its largest; with the gradient of the identity."""
    parts, scale = in_parts(rows)
    return parts * scale


def in_parts(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., C) as 128ths of a scale (..., 1), between ±127/128, in float32 or better.

    Every half precision holds them as they are, and sums of their products too, as far as it reaches.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    scale = rows.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) * (128 / 127)
    parts = rows / scale
    return parts + ((parts * 128).round() / 128 - parts).detach(), scale


class QuantisedLinear(nn.Linear):
    """A linear layer that computes with rounded weights and features.

    Under mixed precision sums are rounded, and what becomes of them, neither weights nor features.
    """

    def forward(self, features: Tensor) -> Tensor:
        parts, scale = in_parts(features)
        of_weight, weight_scale = in_parts(self.weight)
        sums = F.linear(parts, of_weight)
        found = sums * (scale * weight_scale.mT)
        return (found if self.bias is None else found + self.bias).to(sums.dtype)


def quantise(model: nn.Module) -> None:
    """Have a model's linear layers round, in place: parameters, their names and hooks stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = QuantisedLinear


@torch.no_grad()
def put_on_grid(model: nn.Module) -> None:
    """Round the weights themselves, in place, and have the layers be ordinary ones."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) in (nn.Linear, QuantisedLinear):
            module.weight.copy_(on_grid(module.weight))
            module.__class__ = nn.Linear
