"""The diffusers pipeline that students and teachers are saved with."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DiTTransformer2DModel,
    ImagePipelineOutput,
    ModelMixin,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from shd_diffusion.data.latent_space import LatentScaling, LatentSpace
from shd_diffusion.errors import did_you_mean
from shd_diffusion.files import read_json, write_json
from shd_diffusion.models.denoiser import null_condition, num_classes
from shd_diffusion.models.denoiser import sample_shape as shape_in_config
from shd_diffusion.models.families import FAMILIES, Family, family_of
from shd_diffusion.models.pipeline_folder import INDEX, PipelineFolder
from shd_diffusion.sampling import standalone_pipeline
from shd_diffusion.sampling.guidance import power_cosine_scale, predict_guided
from shd_diffusion.sampling.schedulers import uses_predicted_variance


class ClassConditionalPipeline(standalone_pipeline.ClassConditionalPipeline):
    """Images by class or by no condition, with classifier-free guidance, in pixels or a VAE's latents.

    Args:
        denoiser: conditional by label, or by nothing; see `shd_diffusion.models.denoiser`.
        scheduler: any diffusers scheduler of the denoiser's objective.
        vae: decodes latents to images; None where the denoiser works on pixels.
        sample_shape: (C, H, W) of what the denoiser was trained on; None: what its config is made for.
        id2label: the names of the classes by their numbers, as in `DiTPipeline`.
    """

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the noise that an image starts from.

        Raises:
            ValueError: neither the pipeline nor the denoiser's config says it.
        """
        shape = self.config["sample_shape"] or shape_in_config(self.denoiser)
        if shape is None:
            raise ValueError(
                f"the config of a {type(self.denoiser).__name__} names no size; give the pipeline its `sample_shape`"
            )
        return tuple(int(size) for size in shape)

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # guidance has more arguments here, and they stand together
        self,
        class_labels: Sequence[int] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_power: float | None = None,
        guidance_interval: Sequence[int] | None = None,
        guidance_channels: int | None = None,
        num_images: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image a label, or so many without.

        Args:
            class_labels: B labels; None: the null condition, or none at all where the model knows none.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w in ε_uncond + w (ε_cond - ε_uncond) (Ho and Salimans 2022); 1 is without guidance
                and needs one forward pass a step instead of two. Without labels both are the same, whatever w is.
            guidance_power: raises w from 1 at pure noise to `guidance_scale`, see `power_cosine_scale`; None
                keeps it constant.
            guidance_interval: first and last training timestep with guidance (Kynkäänniemi et al. 2024).
            guidance_channels: so many channels are guided; None for all.
            num_images: B, where there are no labels.
            generator: one for the batch, or B of them, so that an image does not depend on its batch.
            latents: (B, C, H, W) standard normal noise to start from, instead of drawing it.
            output_type: `pil`, `np` (B, H, W, C) in [0, 1], or `pt` (B, C, H, W) in [0, 1].
            return_dict: False returns a tuple instead of an `ImagePipelineOutput`.

        Raises:
            ValueError: a label is none of the model's classes, or `latents` has the wrong shape.
        """
        count = num_images if class_labels is None else len(class_labels)
        shape = (count, *self.noise_shape)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        condition, null = self._conditions(class_labels, count)
        latents = self._first_latents(shape, num_inference_steps, generator, latents)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            scale = guidance_scale
            if guidance_interval is not None and not guidance_interval[0] <= timestep <= guidance_interval[1]:
                scale = 1.0
            elif guidance_power is not None:
                steps = self.scheduler.config.num_train_timesteps
                scale = float(power_cosine_scale(timestep, scale, guidance_power, steps))
            noised = self._scaled(latents, timestep)
            prediction = predict_guided(
                self.denoiser, noised, timestep.expand(count), condition, null, scale, guidance_channels
            )
            if not uses_predicted_variance(self.scheduler):
                prediction = prediction[:, : shape[1]]
            latents = self._step(prediction, timestep, latents, generator)
        return self._images(latents, output_type, return_dict)

    def _known_labels(self, unknown: str) -> str:
        return did_you_mean(unknown, self.labels) if self.labels else "they have no names, give numbers"

    def _decode(self, latents: Tensor) -> Tensor:
        return LatentSpace(self.vae).decode(latents)

    def _conditions(
        self, labels: Sequence[int] | None, count: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The condition of a batch, and what it is guided away from: nothing, where it is the null condition."""
        device, classes = self._execution_device, num_classes(self.denoiser)
        null = {name: value.to(device) for name, value in null_condition(self.denoiser).items()}
        if labels is None:
            return {name: value.expand(count, *value.shape[1:]) for name, value in null.items()}, {}
        if classes is None:
            raise ValueError(f"a {type(self.denoiser).__name__} takes no class labels")
        if any(not 0 <= label < classes for label in labels):
            raise ValueError(f"class labels go from 0 to {classes - 1}")
        return {"class_labels": torch.tensor(labels, device=device)}, null


def save_pipeline(
    model: ModelMixin,
    within: PipelineFolder | None,
    scheduler: SchedulerMixin,
    vae: ModelMixin | None,
    shape: Sequence[int],
    to: Path,
    class_names: Sequence[str] | None = None,
) -> None:
    """Save a model in the kind of pipeline that it was trained for.

    A DiT of 1,000 classes on latents is saved as diffusers' DiTPipeline, which takes 1,000 for the null class; any
    other model by class with the code of its pipeline beside it, so that diffusers alone can sample it, where it has
    the denoiser's class; not one that is called by rules of its own.

    Args:
        within: that pipeline; one by prompts is saved with the model in it, and its own scheduler and VAE.
        scheduler: of a pipeline by class, as are the VAE and the shape of its samples.
        class_names: of all classes; without them those of `within`.
    """
    if within is not None and within.takes_prompts:
        within.save_with(model, to)
        return
    named = numbered(class_names)
    if named is None and within is not None:
        named = within.index.get("id2label")
    if named is not None and len(named) != num_classes(model):
        named = None
    if vae is not None and _fits_dit_pipeline(model, vae, shape):
        DiTPipeline(model, vae, scheduler).save_pretrained(to, safe_serialization=True)
        if named is not None:  # an argument of its constructor, which it does not keep
            write_json(to / INDEX, {**read_json(to / INDEX), "id2label": named})
        return
    pipeline = ClassConditionalPipeline(model, scheduler, vae, list(shape), named)
    pipeline.save_pretrained(to, safe_serialization=True)
    if _is_called_plainly(model) and (vae is None or _is_scaled_by_factors(vae)):
        shutil.copyfile(Path(standalone_pipeline.__file__), to / "pipeline.py")


def numbered(class_names: Sequence[str] | None) -> dict[str, str] | None:
    """The names of classes by their numbers, as JSON and `id2label` have them."""
    return None if class_names is None else {str(number): name for number, name in enumerate(class_names)}


def _fits_dit_pipeline(model: ModelMixin, vae: ModelMixin, shape: Sequence[int]) -> bool:
    """Whether DiTPipeline samples a model as `ClassConditionalPipeline` does."""
    return (
        type(model) is DiTTransformer2DModel
        and num_classes(model) == 1000
        and tuple(shape) == shape_in_config(model)
        and type(vae) is AutoencoderKL
        and LatentScaling.of(vae).shift == (0.0,)
    )


def _is_called_plainly(model: ModelMixin) -> bool:
    """Whether the code beside a pipeline knows how to call a model: without rules of its own, or by one-hot tokens."""
    return family_of(model) in (Family(), FAMILIES["UNet2DConditionModel"])


def _is_scaled_by_factors(vae: ModelMixin) -> bool:
    """Whether a VAE of images has one factor and one shift for all of its channels."""
    space = LatentSpace(vae)
    return len(space.scaling.scale) == 1 and space.patch_size == 1 and not space.is_for_videos
