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
    step = rows.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) / 127
    return rows + ((rows / step).round() * step - rows).detach()


class QuantisedLinear(nn.Linear):
    """A linear layer that computes with rounded weights and features."""

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(on_grid(features), on_grid(self.weight), self.bias)


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
