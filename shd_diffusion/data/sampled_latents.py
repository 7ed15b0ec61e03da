"""Training latents that a teacher samples from prompts, where there are no images (LightGen, arXiv 2503.08619)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from pydantic import Field
from torch import Tensor

from shd_diffusion.data.latent_space import LatentSpace
from shd_diffusion.errors import UserError
from shd_diffusion.models.families import unpack
from shd_diffusion.models.last_step import last_step
from shd_diffusion.models.pipeline_call import call_defaults
from shd_diffusion.models.prompts import PromptEncoder
from shd_diffusion.randomness import generator
from shd_diffusion.section import Section


class TeacherSamplingConfig(Section):
    """How the teacher samples training latents for a data set of prompts. Latent j follows from (seed, j); where a
    pipeline's prompts change with those beside them, they are sampled one by one."""

    num_inference_steps: int = Field(25, ge=1)
    guidance_scale: float | None = Field(None, ge=0, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**63)


class LatentSampler:
    """Latents of prompts by a text-to-image pipeline with all its weights.

    Args:
        size: of the images in pixels; `shape` is that of the latents.

    Raises:
        UserError: the pipeline's call takes no guidance scale.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        space: LatentSpace,
        size: tuple[int, int],
        shape: Sequence[int],
        config: TeacherSamplingConfig,
        arguments: Mapping[str, Any],
    ) -> None:
        takes = inspect.signature(type(pipeline).__call__).parameters
        self.pipeline, self.space, self.shape, self.config = pipeline, space, tuple(shape), config
        self.arguments = {"height": size[0], "width": size[1], **call_defaults(type(pipeline)), **arguments}
        if config.guidance_scale is not None:
            if "guidance_scale" not in takes:
                raise UserError(
                    f"key `prepare.teacher_sampling.guidance_scale`: the call of {type(pipeline).__name__} takes none; "
                    "remove it"
                )
            self.arguments["guidance_scale"] = config.guidance_scale
        pipeline.set_progress_bar_config(disable=True)
        self._together = PromptEncoder(pipeline, size, arguments).same_in_any_batch

    def sample(self, indices: Sequence[int], prompts: Sequence[str]) -> Tensor:
        """The latents of prompts as a VAE would give them, unscaled, (B, C, h, w), float32 on the CPU."""
        if self._together:
            return self._sample(indices, prompts)
        return torch.cat(
            [self._sample([index], [prompt]) for index, prompt in zip(indices, prompts, strict=True)]
        )

    @torch.no_grad()
    def _sample(self, indices: Sequence[int], prompts: Sequence[str]) -> Tensor:
        with last_step(self.pipeline.scheduler) as steps:
            self.pipeline(
                prompt=list(prompts),
                num_inference_steps=self.config.num_inference_steps,
                generator=[generator(self.config.seed, "teacher", index) for index in indices],
                output_type="latent",
                **self.arguments,
            )
        latents = steps[-1].float()
        if latents.ndim == 3:  # packed: p×p patches are tokens
            height, width = self.shape[-2:]
            patch = round((height * width / latents.shape[1]) ** 0.5)
            latents = unpack(latents, torch.Size((height, width)), patch)
        return self.space.denormalise(latents.view(-1, *self.shape)).cpu()
