"""When, and with what weight, a term of the loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi
from typing import Literal

import torch
from torch import Tensor

Decay = Literal["constant", "linear", "cosine"]


def schedule_weight(weight: float, step: int, max_steps: int, decay: Decay = "constant") -> float:
    """The weight of a term at a step, counted from 0.

    Args:
        weight: at step 0.
        step: the training step.
        max_steps: where a decaying weight would reach 0.
        decay: `constant`, `linear`, or `cosine` (half a period).
    """
    done = min(step / max(max_steps, 1), 1.0)
    match decay:
        case "constant":
            return weight
        case "linear":
            return weight * (1 - done)
        case "cosine":
            return weight * (1 + cos(pi * done)) / 2


def within(timesteps: Tensor, limits: Sequence[int]) -> Tensor:
    """Indices of the samples whose timestep lies in [first, last]."""
    return torch.nonzero((timesteps >= limits[0]) & (timesteps <= limits[1]))[:, 0]
