"""A few samples and their Fréchet distance while a model trains: what `train.watch` asks for."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from torchvision.utils import make_grid

from shd_diffusion.config import RunConfig
from shd_diffusion.data import reference_images, to_rgb_bytes
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import extractor_name, load_extractor, watch_fid
from shd_diffusion.evaluation.extractors import image_size_of
from shd_diffusion.evaluation.references import open_reference
from shd_diffusion.sampling import ClassConditionalPipeline
from shd_diffusion.sampling.generate import sample_indices
from shd_diffusion.sampling.passes import deal_passes
from shd_diffusion.training.loop import Watch

ROWS, COLUMNS = 5, 10
SMALLEST = 48  # pixels: the width of an image in the picture, at least


def make_watch(
    config: RunConfig, sampler: SchedulerMixin, vae: ModelMixin | None, device: torch.device
) -> Watch | None:
    """The Fréchet distance of a model in training, and a picture of its samples; None where it is not watched.

    The samples are the first of those that `sample` would draw, in fewer steps, so they compare between runs.

    Args:
        config: of the run.
        sampler: the scheduler that samples.
        vae: decodes the samples of a model in latents.
        device: where the samples are made.

    Raises:
        UserError: the images to compare with, or the extractor's weights, cannot be read, or do not fit each other.
    """
    wanted, evaluate = config.train.watch, config.evaluate
    if not wanted.every:
        return None
    name = extractor_name(evaluate.extractor, config.data.name)
    real, only = reference_images(config.data), image_size_of(name)
    _, height, width = real[0].shape
    if only is not None and (height, width) != (only, only):
        raise UserError(
            f"key `train.watch`: `{name}` takes {only}×{only} images only, not {width}×{height}; set "
            "`evaluate.extractor` to another, or `train.watch.every` to 0"
        )
    extractor = load_extractor(name, evaluate.extractor_weights).to(device)
    reference = open_reference(
        evaluate.reference or real, extractor, evaluate.batch_size, evaluate.resize, min(height, width)
    ).statistics["features"]
    sample = config.sample.model_copy(
        update={"num_inference_steps": wanted.num_inference_steps, "num_images": wanted.num_images}
    )

    if vae is not None:
        vae.to(device)

    def watch(model: ModelMixin) -> tuple[dict[str, float], Tensor]:
        pipeline = ClassConditionalPipeline(model, sampler, vae)
        pipeline.set_progress_bar_config(disable=True)
        passes = [
            to_rgb_bytes(sample_indices(pipeline, indices, sample)).cpu() for indices in deal_passes(sample)
        ]
        images = torch.cat(passes)[: wanted.num_images]
        return {"fid": watch_fid(images, reference, extractor)}, sample_grid(images)

    return watch


def sample_grid(images: Tensor) -> Tensor:
    """The first few images (N, 3, H, W), side by side in rows: (H', W', 3). Small ones are enlarged, pixel by pixel."""
    scale = max(1, SMALLEST // images.shape[-1])
    shown = images[: ROWS * COLUMNS].repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    return make_grid(shown, nrow=COLUMNS, padding=2, pad_value=255).permute(1, 2, 0).contiguous()
