"""Classifier-free guidance as the authors of DiT and MDTv2 sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from shd_diffusion.attention.capture import unwrap
from shd_diffusion.models.denoiser import Condition, drop_condition, predict


def power_cosine_scale(
    timesteps: Tensor, guidance_scale: float, power: float = 4.0, num_train_timesteps: int = 1000
) -> Tensor:
    """MDTv2's guidance scale by timestep: from 1 at pure noise to `guidance_scale` at none.

    w(t) = 1 + (w - 1) · (1 - cos(π (1 - t/T)^power)) / 2. A large power guides late and keeps diversity, one
    near 0 guides from the start. The authors' scripts: w = 3.8 and power 4 to measure, 4 and 0.01 to look at.

    Args:
        timesteps: any shape, in training timesteps.
        guidance_scale: w.
        power: exponent on the share of the way that is done.
        num_train_timesteps: T.

    Returns:
        The scales, in the shape of `timesteps`, float32 or better.
    """
    done = 1 - timesteps.to(torch.promote_types(timesteps.dtype, torch.float32)) / num_train_timesteps
    return 1 + (guidance_scale - 1) * (1 - torch.cos(math.pi * done**power)) / 2


def guide(
    conditional: Tensor, unconditional: Tensor, scale: Tensor | float, channels: int | None = None
) -> Tensor:
    """ε_uncond + w (ε_cond - ε_uncond) on the first channels; the others are the conditional ones.

    Args:
        conditional: (B, C, H, W), the prediction with the condition.
        unconditional: (B, C, H, W), the prediction with the null condition, for the same noised input.
        scale: w, one number or (B,).
        channels: how many channels are guided; None for all. The authors of DiT and MDTv2 guide 3 of their 4.
    """
    if isinstance(scale, Tensor):
        scale = scale.reshape(-1, *[1] * (conditional.ndim - 1)).to(conditional.dtype)
    guided = unconditional + scale * (conditional - unconditional)
    return guided if channels is None else torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)


def predict_guided(
    model: nn.Module,
    noised: Tensor,
    timesteps: Tensor,
    condition: Condition,
    null: Condition,
    scale: float,
    channels: int | None = None,
) -> Tensor:
    """As `predict`, guided away from the null condition; one pass of twice the samples, or of as many at scale 1.

    Args:
        model: the denoiser, in any precision.
        noised: (B, C, H, W), in the precision that the prediction is wanted in.
        timesteps: (B,).
        condition: (B, ...) by argument.
        null: (1, ...) by argument; empty: there is nothing to be guided away from.
        scale: w.
        channels: how many are guided; None: those of `noised`, without a predicted variance.
    """
    if scale == 1.0 or not null:
        return _predict(model, noised, timesteps, condition)
    dropped = drop_condition(condition, null, torch.ones(len(noised), dtype=torch.bool))
    both = {name: torch.cat([value, dropped[name]]) for name, value in condition.items()}
    prediction = _predict(model, torch.cat([noised, noised]), torch.cat([timesteps, timesteps]), both)
    conditional, unconditional = prediction.chunk(2)
    return guide(conditional, unconditional, scale, channels or noised.shape[1])


def _predict(model: nn.Module, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
    """As `predict`, of a model that may be in half precision; guidance multiplies rounding, so it is not."""
    dtype: Any = unwrap(model).dtype
    return predict(model, noised.to(dtype), timesteps, condition).to(noised.dtype)
