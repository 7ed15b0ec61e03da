"""N images by index: the label and the noise of image j follow from (seed, j) alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor

from shd_diffusion.config import SampleConfig
from shd_diffusion.data.images import to_rgb_bytes
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_json, replacing_file, write_json
from shd_diffusion.models.adapter import null_label, sample_shape
from shd_diffusion.processes import processes
from shd_diffusion.progress import progress_bar
from shd_diffusion.protocol import flatten
from shd_diffusion.randomness import generator
from shd_diffusion.sampling.passes import deal_passes
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline

SUMMARY = "sampling.json"


def make_scheduler(name: str, arguments: dict[str, Any], trained_with: SchedulerMixin) -> SchedulerMixin:
    """A diffusers scheduler by its class name, on the noise schedule that the model was trained with.

    Raises:
        ValueError: diffusers has no scheduler of that name, it takes no such argument, or it samples models of another
            objective.
    """
    kind: Any = getattr(diffusers, name, None)
    if not hasattr(kind, "set_timesteps"):
        raise ValueError(f"`{name}` is no scheduler class of diffusers {diffusers.__version__}")
    unknown = sorted(set(arguments) - set(kind._get_init_keys(kind)))
    if unknown:
        raise ValueError(f"`{name}` takes no argument `{unknown[0]}`")
    if "variance_type" in kind._get_init_keys(kind) and not issubclass(kind, DDPMScheduler):
        # only DDPM draws with the variance that a model has learned
        arguments = {"variance_type": None, **arguments}
    scheduler = kind.from_config(trained_with.config, **arguments)
    flows = _samples_flows(trained_with)
    if _samples_flows(scheduler) != flows:
        wanted, other = "a flow" if flows else "noise", type(trained_with).__name__
        raise ValueError(
            f"the model predicts {wanted}, which `{name}` does not sample by; take {other} or its kin"
        )
    return scheduler


def _samples_flows(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is for flow matching: by its class, or as a solver that is set to it."""
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


def labels_of(indices: Sequence[int], num_classes: int, config: SampleConfig) -> list[int]:
    """The labels of these images: round the classes, so that every prefix is as balanced as it can be, or random."""
    if config.labels == "balanced":
        return [index % num_classes for index in indices]
    drawn = (generator(config.seed, "label", index) for index in indices)
    return [int(torch.randint(num_classes, (), generator=each)) for each in drawn]


def sample_indices(
    pipeline: ClassConditionalPipeline, indices: Sequence[int], config: SampleConfig
) -> Tensor:
    """The images of these indices: (B, C, H, W) in [-1, 1]."""
    generators = [generator(config.seed, "sample", index) for index in indices]
    shape = sample_shape(pipeline.denoiser)
    noise = torch.stack([torch.randn(shape, generator=each) for each in generators])
    (images,) = pipeline(
        labels_of(indices, null_label(pipeline.denoiser), config),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        guidance_power=config.guidance_power,
        guidance_interval=config.guidance_interval,
        guidance_channels=config.guidance_channels,
        generator=generators,
        latents=noise,
        output_type="pt",
        return_dict=False,
    )
    return images * 2 - 1


def generate(
    pipeline: ClassConditionalPipeline,
    config: SampleConfig,
    folder: Path,
    protocol: dict[str, Any],
    name: str,
) -> dict[str, Any]:
    """Write `config.num_images` PNG files, continuing where an interrupted call stopped.

    The files depend neither on interruptions, nor on the number of processes, nor on `config.batch_size`; see
    `deal_passes`.

    Args:
        pipeline: its scheduler is the one to sample with.
        config: how many, how, and from which seed.
        folder: gets `000000.png` … and `sampling.json`.
        protocol: what the images depend on beside `config`; recorded, and compared before files are reused.
        name: shown in the progress bar.

    Returns:
        The content of `sampling.json`.

    Raises:
        UserError: the folder holds images of another protocol, or of another origin.
    """
    state = processes()
    protocol = {**protocol, **config.model_dump(exclude={"num_images", "batch_size"})}
    summary = _open(folder, protocol)
    if not summary:
        summary = {"num_images": 0, "labels": [], "seconds_per_image": 0.0, "protocol": protocol}
    if state.is_main_process and not summary["num_images"]:
        write_json(folder / SUMMARY, summary)
    pipeline.set_progress_bar_config(disable=True)
    computed, seconds = 0, 0.0
    state.wait_for_everyone()
    with progress_bar(config.num_images, f"sample {name}", "image", visible=state.is_main_process) as bar:
        for indices in deal_passes(config, state.process_index, state.num_processes):
            wanted = [index for index in indices if index < config.num_images]
            missing = {index for index in wanted if not image_path(folder, index).exists()}
            if missing:
                began = time.perf_counter()
                images = to_rgb_bytes(sample_indices(pipeline, indices, config)).cpu()
                seconds, computed = seconds + time.perf_counter() - began, computed + len(indices)
                for index, image in zip(indices, images, strict=True):
                    if index in missing:
                        _write_png(image_path(folder, index), image)
            bar.update(min(len(wanted) * state.num_processes, config.num_images - bar.n))
    state.wait_for_everyone()
    if state.is_main_process and (computed or summary["num_images"] < config.num_images):
        there = max(config.num_images, summary["num_images"])
        summary = {
            "num_images": there,
            "labels": labels_of(range(there), null_label(pipeline.denoiser), config),
            "seconds_per_image": seconds / computed if computed else summary["seconds_per_image"],
            "protocol": protocol,
        }
        write_json(folder / SUMMARY, summary)
    state.wait_for_everyone()
    return read_json(folder / SUMMARY)


def image_path(folder: Path, index: int) -> Path:
    """Where image `index` is kept."""
    return folder / f"{index:06d}.png"


def _open(folder: Path, protocol: dict[str, Any]) -> dict[str, Any]:
    """What is known of the images in the folder, which must have been made under the same protocol."""
    if not (folder / SUMMARY).exists():
        if next(folder.glob("*.png"), None):
            raise UserError(
                f"{folder}: has images of another origin, without a {SUMMARY}; sample into another folder"
            )
        return {}
    summary = read_json(folder / SUMMARY)
    there, now = flatten(_protocol_of(summary)), flatten(protocol)
    for key in sorted(there.keys() | now.keys()):
        if there.get(key) != now.get(key):
            raise UserError(
                f"{folder / SUMMARY}: these samples were made with another `{key}` ({there.get(key)!r}, now "
                f"{now.get(key)!r}); set it as it was, delete the folder, or sample into another (--output)"
            )
    return summary


def _protocol_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The protocol of samples; those of before `pass_size` have balanced labels and passes of their `batch_size`."""
    return {"pass_size": summary.get("batch_size"), "labels": "balanced", **summary["protocol"]}


def _write_png(path: Path, image: Tensor) -> None:
    with replacing_file(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="png")
