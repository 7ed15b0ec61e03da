"""Images by class, or by nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shd_diffusion.config import SampleConfig
from shd_diffusion.data.images import to_rgb_bytes
from shd_diffusion.errors import UserError
from shd_diffusion.models.denoiser import num_classes
from shd_diffusion.randomness import generator
from shd_diffusion.sampling.execution import matmul_precision
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline
from shd_diffusion.sampling.schedulers import scheduler_protocol

OF_PROMPTS = {"prompts", "images_per_prompt", "negative_prompt", "pipeline_arguments"}
NOT_IN_A_PROTOCOL = {"num_images", "batch_size"}


class ByClass:
    """An `ImageSampler` of a `ClassConditionalPipeline`; its scheduler is the one to sample with."""

    def __init__(self, pipeline: ClassConditionalPipeline, config: SampleConfig) -> None:
        labels = config.labels if isinstance(config.labels, str) else find_labels(pipeline, config.labels)
        self.pipeline, self.config = pipeline, config.model_copy(update={"labels": labels})

    def images(self, indices: Sequence[int]) -> Tensor:
        with matmul_precision(self.config):
            images = sample_images(self.pipeline, indices, self.config)
        if not images.isfinite().all():
            raise ValueError("its images are not finite: the model has diverged, train it anew")
        return to_rgb_bytes(images)

    def told(self, count: int) -> dict[str, Any]:
        labels = labels_of(range(count), num_classes(self.pipeline.denoiser), self.config)
        return {"labels": labels, "class_names": self.pipeline.config["id2label"]}

    def lines(self, count: int) -> list[dict[str, Any]]:
        return []

    def settings(self) -> dict[str, Any]:
        settings = self.config.protocol(without=NOT_IN_A_PROTOCOL | OF_PROMPTS)
        scale = self.config.guidance_scale
        return (
            settings
            | scheduler_protocol(self.pipeline.scheduler)
            | {"guidance_scale": 1.0 if scale is None else scale}
        )


def find_labels(pipeline: ClassConditionalPipeline, labels: Sequence[int | str]) -> list[int]:
    """Classes by number or name as numbers. A name may look like a number: then it goes before that.

    Raises:
        UserError: there is no such class.
    """
    classes = num_classes(pipeline.denoiser)
    if classes is None:
        raise UserError("key `sample.labels`: the model knows no classes; set it to balanced")
    found = []
    for label in labels:
        if str(label) in pipeline.labels or isinstance(label, str):
            try:
                found += pipeline.get_label_ids(str(label))
            except ValueError as error:
                raise UserError(f"key `sample.labels`: {error}") from None
        elif not 0 <= label < classes:
            raise UserError(f"key `sample.labels`: no class {label}; they go from 0 to {classes - 1}")
        else:
            found.append(label)
    if not found:
        raise UserError("key `sample.labels`: lists no class; name some, or set it to balanced")
    return found


def labels_of(indices: Sequence[int], num_classes: int | None, config: SampleConfig) -> list[int] | None:
    """The labels of these images: round the classes, or those that are listed, so that every prefix is as balanced as
    it can be; or random. None where there are no classes.
    """
    if num_classes is None:
        return None
    if isinstance(config.labels, list):
        return [int(config.labels[index % len(config.labels)]) for index in indices]
    if config.labels == "balanced":
        return [index % num_classes for index in indices]
    drawn = (generator(config.seed, "label", index) for index in indices)
    return [int(torch.randint(num_classes, (), generator=each)) for each in drawn]


def sample_images(pipeline: ClassConditionalPipeline, indices: Sequence[int], config: SampleConfig) -> Tensor:
    """The images of these indices: (B, C, H, W) in [-1, 1]."""
    generators = [generator(config.seed, "sample", index) for index in indices]
    noise = torch.stack([torch.randn(pipeline.noise_shape, generator=each) for each in generators])
    (images,) = pipeline(
        labels_of(indices, num_classes(pipeline.denoiser), config),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=1.0 if config.guidance_scale is None else config.guidance_scale,
        guidance_power=config.guidance_power,
        guidance_interval=config.guidance_interval,
        guidance_channels=config.guidance_channels,
        num_images=len(indices),
        generator=generators,
        latents=noise,
        output_type="pt",
        return_dict=False,
    )
    return images * 2 - 1
