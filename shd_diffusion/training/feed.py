"""The batches of any step: data order, noise, timesteps and dropped labels follow from (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import ModelMixin

from shd_diffusion.config import RunConfig
from shd_diffusion.data.source import Source
from shd_diffusion.losses.denoising import ForwardProcess
from shd_diffusion.models.adapter import null_label, num_tokens, sample_shape
from shd_diffusion.training.data_order import Layout, StepSampler
from shd_diffusion.training.draws import draw
from shd_diffusion.training.methods import Batch, make_batch


class Feed:
    """This process's share of every step from `start` on, noised; steps are asked for in order.

    Args:
        source: what to train on.
        process: the forward process.
        model: tells shapes, and the label that stands for none.
        config: of the run.
        layout: how a step's images are dealt out.
        device: where the batches go.
        start: the first step.
    """

    def __init__(
        self,
        source: Source,
        process: ForwardProcess,
        model: ModelMixin,
        config: RunConfig,
        layout: Layout,
        device: torch.device,
        start: int,
    ) -> None:
        self.source, self.process, self.config, self.layout, self.device = (
            source,
            process,
            config,
            layout,
            device,
        )
        sampler = StepSampler(config.seed, len(source), layout, start, config.train.max_steps)
        self.items = source.batches(sampler)
        self.shape, self.null = sample_shape(model), null_label(model)
        ratio = config.train.mask_ratio
        self.masking = (num_tokens(model), ratio) if ratio else None

    def batches(self, step: int) -> Iterator[Batch]:
        """One batch for each accumulated forward pass of a step."""
        drawn = draw(
            self.config.seed,
            step,
            self.layout.step_size,
            self.shape,
            self.process.num_timesteps,
            self.config.train.label_drop,
            self.source.needs_noise,
            self.config.diffusion.timestep_sampling,
            self.masking,
        )
        for micro_step in range(self.layout.accumulation):
            raw, labels = (part.to(self.device, non_blocking=True) for part in next(self.items))
            mine = drawn.take(self.layout.share(micro_step), self.device)
            clean = self.source.clean(raw, mine.flipped, mine.latent_noise)
            yield make_batch(self.process, clean, labels, mine, self.null)
