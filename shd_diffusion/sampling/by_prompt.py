"""Images by prompt, through a text-to-image pipeline of diffusers and its own call."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError
from shd_diffusion.models.pipeline_call import call_defaults
from shd_diffusion.randomness import generator
from shd_diffusion.sampling.by_class import NOT_IN_A_PROTOCOL
from shd_diffusion.sampling.execution import matmul_precision
from shd_diffusion.sampling.schedulers import scheduler_protocol

OF_CLASSES = {"labels", "guidance_power", "guidance_interval", "guidance_channels"}


def call_arguments(
    kind: type[DiffusionPipeline], config: SampleConfig, size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """What the call of a pipeline class is given, beside prompts and noise.

    Args:
        size: height and width in pixels; None: the pipeline's default.

    Raises:
        UserError: it takes no such argument, or the config sets what is for pipelines by class.
    """
    given: dict[str, Any] = {"guidance_scale": config.guidance_scale}
    given |= {"height": size[0], "width": size[1]} if size is not None else {}
    arguments: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    arguments |= {"num_inference_steps": config.num_inference_steps}
    arguments |= call_defaults(kind) | config.pipeline_arguments
    known = inspect.signature(kind.__call__).parameters
    for key in (*arguments, *(("negative_prompt",) if config.negative_prompt is not None else ())):
        if key not in known:
            where = key if key in ("guidance_scale", "negative_prompt") else f"pipeline_arguments.{key}"
            raise UserError(f"key `sample.{where}`: the call of {kind.__name__} takes no `{key}`; remove it")
    if wrong := sorted(OF_CLASSES & config.changed()):
        raise UserError(
            f"key `sample.{wrong[0]}`: is for pipelines by class, which {kind.__name__} is not; remove it"
        )
    return arguments


class ByPrompt:
    """An `ImageSampler` of a text-to-image pipeline; its scheduler is the one to sample with.

    Args:
        prompts: at least one; images 0, 1, ... have them in their order, round and round, `images_per_prompt` times
            each.
        size: height and width in pixels; None: the pipeline's default.

    Raises:
        UserError: the call of the pipeline takes no such argument, or the config sets what is for pipelines by class.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        config: SampleConfig,
        prompts: Sequence[str],
        size: tuple[int, int] | None = None,
    ) -> None:
        self.pipeline, self.config, self.prompts = pipeline, config, list(prompts)
        self.arguments = call_arguments(type(pipeline), config, size)

    def images(self, indices: Sequence[int]) -> Tensor:
        with matmul_precision(self.config):
            (images, *_) = self.pipeline(
                **self.inputs(indices),
                generator=[generator(self.config.seed, "sample", index) for index in indices],
                output_type="pt",
                return_dict=False,
                **self.arguments,
            )
        images = images.float()
        asked = self.arguments.get("height"), self.arguments.get("width")
        if None not in asked and images.shape[-2:] != asked:
            raise ValueError(
                f"its images are {images.shape[-2]}×{images.shape[-1]} where {asked[0]}×{asked[1]} are asked for; see "
                "which argument of its call sets their size, and give it in `sample.pipeline_arguments`"
            )
        if images.ndim == 5:  # videos (B, F, 3, H, W): frames side by side
            images = torch.cat(images.unbind(1), dim=-1)
        if not images.isfinite().all():
            raise ValueError("its images are not finite: the model has diverged, train it anew")
        return (images * 255).round().to(torch.uint8)  # as diffusers' numpy_to_pil

    def inputs(self, indices: Sequence[int]) -> dict[str, list[str]]:
        """What the call is given an image: its prompt, and a negative one where the config has one.

        Given a string for all, Stable Diffusion's call fails for more than one image.
        """
        inputs = {"prompt": [self._prompt(index) for index in indices]}
        negative = self.config.negative_prompt
        return inputs if negative is None else inputs | {"negative_prompt": [negative] * len(indices)}

    def told(self, count: int) -> dict[str, Any]:
        return {"prompts": [self._prompt(index) for index in range(count)]}

    def lines(self, count: int) -> list[dict[str, Any]]:
        """Prompts, and the seeds by which plain diffusers makes the same images."""
        return [
            {
                "text": self._prompt(index),
                "seed": generator(self.config.seed, "sample", index).initial_seed(),
            }
            for index in range(count)
        ]

    def settings(self) -> dict[str, Any]:
        settings = self.config.protocol(without=NOT_IN_A_PROTOCOL | OF_CLASSES | {"prompts"})
        scale = inspect.signature(type(self.pipeline).__call__).parameters.get("guidance_scale")
        return settings | {
            "pipeline": type(self.pipeline).__name__,
            "pipeline_arguments": call_defaults(type(self.pipeline)) | self.config.pipeline_arguments,
            **scheduler_protocol(self.pipeline.scheduler),
            "guidance_scale": self.arguments.get("guidance_scale", scale and scale.default),
            "height": self.arguments.get("height"),
            "width": self.arguments.get("width"),
            "prompts_sha256": hashlib.sha256("\0".join(self.prompts).encode()).hexdigest(),
        }

    def _prompt(self, index: int) -> str:
        return self.prompts[index // self.config.images_per_prompt % len(self.prompts)]
