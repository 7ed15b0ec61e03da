"""The diffusers pipeline that students and teachers are saved with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from shd_diffusion.models.adapter import null_label, predict, sample_shape
from shd_diffusion.sampling.guidance import guide, power_cosine_scale


class ClassConditionalPipeline(DiffusionPipeline):
    """Images by class, with classifier-free guidance, any diffusers scheduler, in pixels or a VAE's latents.

    Args:
        denoiser: a class-conditional model; see `shd_diffusion.models.adapter`.
        scheduler: any diffusers scheduler of the denoiser's objective.
        vae: decodes latents to images; None where the denoiser works on pixels.
    """

    model_cpu_offload_seq = "denoiser->vae"
    _optional_components: list[str] = ["vae"]  # noqa: RUF012 -- the name and type that diffusers looks for

    def __init__(self, denoiser: nn.Module, scheduler: SchedulerMixin, vae: nn.Module | None = None) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_power: float | None = None,
        guidance_interval: Sequence[int] | None = None,
        guidance_channels: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image a label.

        Args:
            class_labels: B labels.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w in ε_uncond + w (ε_cond - ε_uncond) (Ho and Salimans 2022); 1 is without guidance
                and needs one forward pass a step instead of two.
            guidance_power: raises w from 1 at pure noise to `guidance_scale`, see `power_cosine_scale`; None
                keeps it constant.
            guidance_interval: first and last training timestep with guidance (Kynkäänniemi et al. 2024).
            guidance_channels: so many channels are guided; None for all.
            generator: one for the batch, or B of them, so that an image does not depend on its batch.
            latents: (B, C, H, W) standard normal noise to start from, instead of drawing it.
            output_type: `pil`, `np` (B, H, W, C) in [0, 1], or `pt` (B, C, H, W) in [0, 1].
            return_dict: False returns a tuple instead of an `ImagePipelineOutput`.

        Raises:
            ValueError: a label is none of the model's classes, or `latents` has the wrong shape.
        """
        device, dtype = self._execution_device, self.denoiser.dtype
        null = null_label(self.denoiser)
        if any(not 0 <= label < null for label in class_labels):
            raise ValueError(f"class labels go from 0 to {null - 1}")
        shape = (len(class_labels), *sample_shape(self.denoiser))
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {shape}")
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        latents = latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        labels = torch.tensor(class_labels, device=device)

        extra = {"generator": generator} if _takes_generator(self.scheduler) else {}
        for timestep in self.progress_bar(self.scheduler.timesteps):
            scale = self._scale_at(timestep, guidance_scale, guidance_power, guidance_interval)
            scaled = latents
            if hasattr(self.scheduler, "scale_model_input"):
                scaled = self.scheduler.scale_model_input(latents, timestep)
            prediction = self._predict(scaled, timestep, labels, null, scale, guidance_channels)
            latents = self.scheduler.step(prediction, timestep, latents, **extra).prev_sample

        images = (self._decode(latents).float() / 2 + 0.5).clamp(0, 1)
        result = images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            result = self.numpy_to_pil(result)
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _scale_at(
        self, timestep: Tensor, scale: float, power: float | None, interval: Sequence[int] | None
    ) -> float:
        """w at one timestep."""
        if interval is not None and not interval[0] <= timestep <= interval[1]:
            return 1.0
        if power is None:
            return scale
        return float(power_cosine_scale(timestep, scale, power, self.scheduler.config.num_train_timesteps))

    def _predict(
        self, latents: Tensor, timestep: Tensor, labels: Tensor, null: int, scale: float, guided: int | None
    ) -> Tensor:
        """The denoiser's prediction with guidance, and with a predicted variance where the scheduler uses one."""
        channels = latents.shape[1]
        timesteps = timestep.expand(len(latents))
        if scale == 1.0:
            prediction = predict(self.denoiser, latents, timesteps, labels)
        else:
            both = predict(
                self.denoiser,
                torch.cat([latents, latents]),
                torch.cat([timesteps, timesteps]),
                torch.cat([labels, torch.full_like(labels, null)]),
            )
            conditional, unconditional = both.chunk(2)
            prediction = guide(conditional, unconditional, scale, guided or channels)
        return prediction if _draws_with_variance(self.scheduler) else prediction[:, :channels]

    def _decode(self, latents: Tensor) -> Tensor:
        if self.vae is None:
            return latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return self.vae.decode(latents / self.vae.config.scaling_factor + shift).sample


def _draws_with_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler uses a variance that the model predicts; others may carry the setting and ignore it."""
    kinds = ("learned", "learned_range")
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.get("variance_type") in kinds


def _takes_generator(scheduler: SchedulerMixin) -> bool:
    return "generator" in scheduler.step.__code__.co_varnames
