"""A few samples and their Fréchet distance while a model trains: what `train.validation` asks for."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torchvision.utils import make_grid

from shd_diffusion.config import RunConfig
from shd_diffusion.data import Source, reference_images
from shd_diffusion.data.images import to_rgb_bytes
from shd_diffusion.evaluation import extractor_name, load_extractor
from shd_diffusion.evaluation.extractors import check_image_size
from shd_diffusion.evaluation.references import open_reference
from shd_diffusion.processes import processes
from shd_diffusion.sampling import ClassConditionalPipeline, sample_images
from shd_diffusion.sampling.batching import deal_passes
from shd_diffusion.sampling.by_class import ByClass
from shd_diffusion.sampling.pipeline import numbered
from shd_diffusion.training.loop import Validation

ROWS, COLUMNS = 5, 10
SMALLEST = 48  # pixels: the width of an image in the picture, at least


def make_validation(
    config: RunConfig, sampler: SchedulerMixin, vae: ModelMixin | None, data: Source, device: torch.device
) -> Validation | None:
    """The Fréchet distance of a model in training, and a picture of its samples; None where it is not validated.

    The samples are the first of those that `sample` would draw, in fewer steps, so they compare between runs. The
    processes take turns at them.

    Raises:
        UserError: the images to compare with, or the extractor's weights, cannot be read, or do not fit each other.
    """
    wanted, evaluate = config.train.validation, config.evaluate
    if not wanted.every or not wanted.num_images:
        return None
    # torchmetrics takes a second to import
    from shd_diffusion.evaluation.torch_metrics import FrechetDistance

    name = extractor_name(evaluate.extractor, config.data.name)
    # a file of statistics needs no images
    reference = evaluate.reference or reference_images(config.trained_on, config.data)
    height, width = data.image_size
    check_image_size(name, (height, width))
    extractor = load_extractor(name, evaluate.extractor_weights, evaluate.clip_model).to(device)
    statistics = open_reference(
        reference, extractor, evaluate.batch_size, evaluate.resize, min(height, width)
    ).statistics["features"]
    # Sharded, each process holds a part of the weights only, and all make the same images.
    together = config.train.shard
    distance = FrechetDistance(extractor, reference=statistics, sync_on_compute=not together).to(device)
    sample = config.sample.model_copy(
        update={"num_inference_steps": wanted.num_inference_steps, "num_images": wanted.num_images}
    )
    if vae is not None:
        vae.to(device)

    @torch.no_grad()
    def validate(model: ModelMixin) -> tuple[dict[str, Any], Tensor]:
        state = processes()
        names = numbered(data.class_names)
        pipeline = ClassConditionalPipeline(model, sampler, vae, list(data.shape), names)
        pipeline.set_progress_bar_config(disable=True)
        resolved = ByClass(pipeline, sample).config
        mine = (
            deal_passes(sample) if together else deal_passes(sample, state.process_index, state.num_processes)
        )
        distance.reset()
        found: list[tuple[int, Tensor]] = []  # index of the first, images
        for indices in mine:
            images = to_rgb_bytes(sample_images(pipeline, indices, resolved))[
                : wanted.num_images - indices.start
            ]
            distance.update(images.to(device), real=False)
            found.append((indices.start, images.cpu()))
        if not together and state.num_processes > 1:
            found = sorted(gather_object(found), key=lambda part: part[0])
        return {"fid": distance.compute().item()}, sample_grid(torch.cat([images for _, images in found]))

    return validate


def sample_grid(images: Tensor) -> Tensor:
    """The first few images (N, 3, H, W), side by side in rows: (H', W', 3). Small ones are enlarged, pixel by pixel."""
    scale = max(1, SMALLEST // images.shape[-1])
    shown = images[: ROWS * COLUMNS].repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    return make_grid(shown, nrow=COLUMNS, padding=2, pad_value=255).permute(1, 2, 0).contiguous()
