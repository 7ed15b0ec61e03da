"""α, the share of the first head in a merged map (paper, eq. 10)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Coefficient = Literal["closed_form", "mean", "select"]


def closed_form(sums: Tensor) -> Tensor:
    """α* = <D X_p, D S> / <D S, D S>, clipped to [0, 1]; 1/2 where every α is optimal.

    Args:
        sums: `pair_sums`, (3, ...).

    Returns:
        α, (...).
    """
    first, mixed, second = sums
    squared = first + 2 * mixed + second  # <D S, D S>
    # Contributions that cancel leave rounding noise of the summands' size, not an exact zero.
    degenerate = squared <= 64 * torch.finfo(sums.dtype).eps * (first + second)
    coefficient = ((first + mixed) / torch.where(degenerate, 1.0, squared)).clamp(0, 1)
    return torch.where(degenerate, 0.5, coefficient)


def select(sums: Tensor) -> Tensor:
    """α in {0, 1}, whichever loses less: on a parabola, the end that is nearer to its minimum."""
    first, _, second = sums
    # The error is <D X_p, D X_p> at α = 0 ... and <D X_q, D X_q> at α = 1: keep p where losing q costs less.
    coefficient = (second < first).to(sums.dtype)
    return torch.where(torch.isfinite(first + second), coefficient, torch.nan)
