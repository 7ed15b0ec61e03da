"""The weight of a norm over the channels of all heads after some of these have left (docs/method.md section 8).

Such a norm divides a token by its mean square over all M·d channels. Over the N·d that stay it divides by another
number, token by token, which no weight can undo: it is the same for all tokens. Least squares, channel by channel, is
as near as a weight comes. For one that divides by the same multiple in every token it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class ChannelMoments:
    """Sums over tokens, in float64, of what a norm puts out in each of n channels, x, and what it should, y.

    Attributes:
        x: Σ x, (n,).
        y: Σ y, (n,).
        xx: Σ x², (n,).
        xy: Σ x·y, (n,).
        tokens: how many.
    """

    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, channels: int, device: torch.device | str = "cpu") -> ChannelMoments:
        """Sums of no tokens."""
        zeros = torch.zeros(4, channels, dtype=torch.float64, device=device)
        return cls(zeros[0], zeros[1], zeros[2], zeros[3])

    def add(self, found: Tensor, wanted: Tensor) -> None:
        """Add tokens: x and y (..., n)."""
        x, y = found.flatten(0, -2).double(), wanted.flatten(0, -2).double()
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.square().sum(0)
        self.xy += (x * y).sum(0)
        self.tokens += len(x)

    def factor(self) -> Tensor:
        """a (n,) that minimises Σ (y - a x)² in each channel; 1 where x is 0."""
        return torch.where(self.xx > 0, self.xy / self.xx, 1.0)

    def line(self) -> tuple[Tensor, Tensor]:
        """a and b (n,) that minimise Σ (y - a x - b)² in each channel; a = 1 where x is the same in all tokens."""
        tokens = max(self.tokens, 1)
        variance = self.xx - self.x.square() / tokens
        varies = variance > self.xx * torch.finfo(self.xx.dtype).eps * tokens
        slope = torch.where(varies, (self.xy - self.x * self.y / tokens) / variance, 1.0)
        return slope, (self.y - slope * self.x) / tokens
