"""The Fréchet distance of a few samples while a model trains: what `train.watch` asks for."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from shd_diffusion.config import RunConfig
from shd_diffusion.data import reference_images, to_rgb_bytes
from shd_diffusion.evaluation import load_extractor, watch_fid
from shd_diffusion.sampling import ClassConditionalPipeline
from shd_diffusion.sampling.generate import sample_indices
from shd_diffusion.sampling.passes import deal_passes
from shd_diffusion.training.loop import Watch


def make_watch(config: RunConfig, sampler: SchedulerMixin, device: torch.device) -> Watch | None:
    """Figures of a model in training by name; None where nothing is to be watched.

    The samples are the first of those that `sample` would draw, in fewer steps, so they compare between runs.

    Raises:
        UserError: the images to compare with, or the extractor's weights, cannot be read.
    """
    wanted, evaluate = config.train.watch, config.evaluate
    if not wanted.every:
        return None
    real = reference_images(config.data)
    reference = torch.stack([real[index] for index in range(len(real))])
    weights = None if evaluate.extractor_weights is None else Path(evaluate.extractor_weights)
    extractor = load_extractor(evaluate.extractor, weights).to(device)
    sample = config.sample.model_copy(
        update={"num_inference_steps": wanted.num_inference_steps, "num_images": wanted.num_images}
    )

    def watch(model: ModelMixin) -> dict[str, float]:
        pipeline = ClassConditionalPipeline(model, sampler)
        pipeline.set_progress_bar_config(disable=True)
        passes = [
            to_rgb_bytes(sample_indices(pipeline, indices, sample)).cpu() for indices in deal_passes(sample)
        ]
        return {"fid": watch_fid(torch.cat(passes)[: wanted.num_images], reference, extractor)}

    return watch
