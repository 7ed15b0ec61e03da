"""The data that a model's weights are fitted on without training."""

from __future__ import annotations

from dataclasses import replace

from diffusers import ModelMixin

from shd_diffusion.compression.compress import Batch
from shd_diffusion.config import RunConfig
from shd_diffusion.data import Source
from shd_diffusion.models.denoiser import null_condition
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.training.batches import BatchLayout, StepSampler, draw_noise, make_batch, noise_settings


def calibration_batches(
    config: RunConfig, model: ModelMixin, source: Source, process: ForwardProcess, images: int, size: int = 64
) -> list[Batch]:
    """Training data as a run sees them, noised and with conditions dropped, but of steps that it never takes."""
    train, null = config.train, {**null_condition(model), **source.null}
    settings = noise_settings(train, source)
    sampler = StepSampler(config.seed, source.groups, BatchLayout(size), 0, max(1, images // size))
    found = []
    for step, items in enumerate(source.batches(sampler)):
        of_these = replace(settings, shape=source.shape_of(items))
        noise = draw_noise(config.seed, -1 - step, range(size), of_these)
        batch = make_batch(source, process, items, noise, null, model.device)
        found.append((batch.noised, batch.timesteps, dict(batch.condition)))
    return found
