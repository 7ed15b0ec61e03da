"""Images by class, or by nothing, for diffusers alone: shd-diffusion puts this file into a pipeline's folder.

    DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)

It makes the images of shd-diffusion's own pipeline, bit for bit, without that package; guidance that changes with the
timestep is left to it, as are models that are called by rules of their own, whose folders have no such file.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class ClassConditionalPipeline(DiffusionPipeline):
    """Images by class or by no condition, with classifier-free guidance, in pixels or a VAE's latents.

    Args:
        denoiser: a DiT, a UNet2DModel, a UNet2DConditionModel by label, or a model that is called like one of them.
        scheduler: any diffusers scheduler of the denoiser's objective.
        vae: decodes latents to images; None where the denoiser works on pixels.
        sample_shape: (C, H, W) of what the denoiser was trained on; None: what its config is made for.
        id2label: the names of the classes by their numbers.
    """

    model_cpu_offload_seq = "denoiser->vae"
    _optional_components: list[str] = ["vae"]  # noqa: RUF012 -- the name and type that diffusers looks for

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: SchedulerMixin,
        vae: nn.Module | None = None,
        sample_shape: list[int] | None = None,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)
        shape = None if sample_shape is None else list(sample_shape)
        self.register_to_config(sample_shape=shape, id2label=id2label)
        named = [(name, int(number)) for number, name in (id2label or {}).items()]
        parts = {part.strip(): number for name, number in named for part in name.split(",")}
        # each of several names of a class, as in DiTPipeline, and all together
        self.labels = parts | dict(named)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """The numbers of classes by their names.

        Raises:
            ValueError: there is no such class, or classes have no names.
        """
        names = [label] if isinstance(label, str) else list(label)
        if unknown := [name for name in names if name not in self.labels]:
            raise ValueError(f"no class `{unknown[0]}`; {self._known_labels(unknown[0])}")
        return [self.labels[name] for name in names]

    def _known_labels(self, unknown: str) -> str:
        return f"there are {', '.join(self.labels) or 'no names'}"

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_channels: int | None = None,
        num_images: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Sample one image a label, or `num_images` without labels.

        Args:
            class_labels: B labels; None: the null class, or nothing where the model knows no classes.
            num_inference_steps: steps of the scheduler.
            guidance_scale: w in ε_uncond + w (ε_cond - ε_uncond) (Ho and Salimans 2022); 1 is without guidance.
            guidance_channels: so many channels are guided; None for all.
            num_images: B, where there are no labels.
            generator: one for the batch, or B of them.
            latents: (B, C, H, W) standard normal noise to start from, instead of drawing it.
            output_type: `pil`, `np` (B, H, W, C) in [0, 1], or `pt` (B, C, H, W) in [0, 1].
            return_dict: False returns a tuple instead of an `ImagePipelineOutput`.
        """
        count = num_images if class_labels is None else len(class_labels)
        shape = (count, *self._noise_shape())
        null = self._num_classes()
        guided = class_labels is not None and guidance_scale != 1.0
        if class_labels is not None and (
            null is None or not all(0 <= label < null for label in class_labels)
        ):
            raise ValueError("no such class labels, or the model takes none")
        labels = [*(class_labels or ()), *([null] * count if guided or class_labels is None else [])]
        told = None if null is None else torch.tensor(labels, device=self._execution_device)
        latents = self._first_latents(shape, num_inference_steps, generator, latents)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            noised = self._scaled(latents, timestep)
            both = torch.cat([noised, noised]) if guided else noised
            prediction = self._predict(both, timestep.expand(len(both)), told)
            if guided:
                conditional, unconditional = prediction.chunk(2)
                first = unconditional + guidance_scale * (conditional - unconditional)
                channels = guidance_channels or shape[1]
                prediction = torch.cat([first[:, :channels], conditional[:, channels:]], dim=1)
            if not self._uses_predicted_variance():
                prediction = prediction[:, : shape[1]]
            latents = self._step(prediction, timestep, latents, generator)
        return self._images(latents, output_type, return_dict)

    def _first_latents(
        self,
        shape: tuple[int, ...],
        num_inference_steps: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """The noise to start from, given or drawn, as the scheduler wants it for so many steps.

        A scheduler's steps add up what half precision rounds off, so latents are kept in float32 or better.
        """
        device, dtype = self._execution_device, torch.promote_types(self.denoiser.dtype, torch.float32)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _scaled(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """As the denoiser sees them."""
        if hasattr(self.scheduler, "scale_model_input"):
            return self.scheduler.scale_model_input(latents, timestep)
        return latents

    def _step(self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: Any) -> Tensor:
        """One step of the scheduler."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        return self.scheduler.step(prediction, timestep, latents, **extra).prev_sample

    def _images(self, latents: Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """What a call returns for the last latents."""
        decoded = latents if self.vae is None else self._decode(latents.to(self.vae.dtype))
        images = (decoded.float() / 2 + 0.5).clamp(0, 1)
        result: Any = images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            result = self.numpy_to_pil(result)
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _noise_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the noise that an image starts from."""
        config = self.denoiser.config
        size = config.get("sample_size")
        sides = (size, size) if isinstance(size, int) else size
        return tuple(self.config["sample_shape"] or (config["in_channels"], *sides))

    def _num_classes(self) -> int | None:
        """The null class, which is the number after the last class; None where the model knows no classes."""
        config = self.denoiser.config
        if config.get("encoder_hid_dim_type") == "image_proj":
            return int(config["encoder_hid_dim"]) - 1
        for key, more in (("num_embeds_ada_norm", 0), ("num_classes", 0), ("num_class_embeds", 1)):
            if config.get(key):
                return int(config[key]) - more
        return None

    def _predict(self, noised: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """What the denoiser predicts, in the precision of `noised`."""
        arguments: dict[str, Any] = {} if labels is None else {"class_labels": labels}
        config = self.denoiser.config
        if labels is not None and config.get("encoder_hid_dim_type") == "image_proj":
            one_hot = F.one_hot(labels, config["encoder_hid_dim"])
            arguments = {"encoder_hidden_states": None, "added_cond_kwargs": {"image_embeds": one_hot}}
        told = {**arguments, "timestep": timesteps, "return_dict": False}
        return self.denoiser(noised.to(self.denoiser.dtype), **told)[0].to(noised.dtype)

    def _uses_predicted_variance(self) -> bool:
        kinds = ("learned", "learned_range")
        return isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config["variance_type"] in kinds

    def _decode(self, latents: Tensor) -> Tensor:
        """Latents as images in [-1, 1]."""
        config = self.vae.config
        scale, shift = (
            config.get(key) or usual for key, usual in (("scaling_factor", 1.0), ("shift_factor", 0.0))
        )
        return self.vae.decode(
            latents / latents.new_tensor(scale) + latents.new_tensor(shift), return_dict=False
        )[0]
