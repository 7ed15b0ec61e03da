"""Training data that a teacher is compressed on: as a run sees them, of steps that it never takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.compression.walk import CalibrationBatch
from shd_diffusion.config import RunConfig
from shd_diffusion.data import Source
from shd_diffusion.models.denoiser import null_condition
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.training.batches import BatchLayout, StepSampler, draw_noise, make_batch, noise_settings


def calibration_batches(
    config: RunConfig,
    model: ModelMixin,
    source: Source,
    process: ForwardProcess,
    images: int,
    size: int = 64,
    timestep_weights: Sequence[float] | None = None,
) -> list[CalibrationBatch]:
    """Training data as a run sees them, noised and with conditions dropped, but of steps that it never takes.

    Args:
        config: of the run.
        model: that is told the conditions.
        source: of the data.
        process: that noises them.
        images: how many, in whole batches.
        size: of a batch.
        timestep_weights: how often timesteps lie in each of so many equal parts of 0..T, evenly inside, in place of how
            training draws them; least noise first.
    """
    train, null = config.train, {**null_condition(model), **source.null}
    settings = noise_settings(train, source)
    if timestep_weights is not None:
        settings = replace(settings, timestep_sampling="uniform")
    sampler = StepSampler(config.seed, source.groups, BatchLayout(size), 0, max(1, images // size))
    found = []
    for step, items in enumerate(source.batches(sampler)):
        of_these = replace(settings, shape=source.shape_of(items))
        noise = draw_noise(config.seed, -1 - step, range(size), of_these)
        if timestep_weights is not None:
            noise = replace(noise, shares=_weighted(process, noise.shares, timestep_weights))
        batch = make_batch(source, process, items, noise, null, model.device)
        found.append((batch.noised, batch.timesteps, dict(batch.condition)))
    return found


def in_passes(batches: Sequence[CalibrationBatch], size: int) -> list[CalibrationBatch]:
    """The same samples, at most so many in a batch: what is drawn does not depend on what goes through at once."""
    return [
        (noised, timesteps, dict(zip(condition, parts, strict=False)))
        for all_noised, all_timesteps, condition in batches
        for noised, timesteps, *parts in zip(
            *(tensor.split(size) for tensor in (all_noised, all_timesteps, *condition.values())), strict=True
        )
    ]


def _weighted(process: ForwardProcess, shares: Tensor, weights: Sequence[float]) -> Tensor:
    """Shares of the schedule (B,) of which so many lie in each part, from shares (B,) drawn evenly."""
    ends = np.linspace(0, process.num_timesteps, len(weights) + 1)
    reached = np.cumsum([0.0, *weights]) / sum(weights)
    return process.shares(torch.from_numpy(np.interp(shares.numpy(), reached, ends)))
