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
    """α in {0, 1}, whichever loses less: |D X_q|² at 1, |D X_p|² at 0."""
    first, mixed, second = sums
    return torch.where(torch.isfinite(first + mixed + second), (second < first).to(sums.dtype), torch.nan)


def select_one(gram: Tensor) -> Tensor:
    """The same for n heads: 1 for the head whose map alone loses least. (..., n, n) `deviation_gram` to (..., n)."""
    lost = gram.diagonal(dim1=-2, dim2=-1)
    chosen = torch.nn.functional.one_hot(lost.argmin(-1), lost.shape[-1]).to(gram.dtype)
    return torch.where(torch.isfinite(lost).all(-1, keepdim=True), chosen, torch.nan)
