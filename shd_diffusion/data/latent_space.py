"""The latent space of a VAE: between images and the normalised latents that a denoiser sees. Only here it is known
how a VAE is called and how its latents are scaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, ModelMixin
from torch import Tensor, nn

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import read_json
from shd_diffusion.models.factory import check_weights
from shd_diffusion.models.hub import try_hub
from shd_diffusion.models.pipeline_folder import find_pipeline
from shd_diffusion.models.tiny_autoencoder import PooledAutoencoderTiny


@dataclass(frozen=True)
class LatentScaling:
    """How latents are brought to a variance of about one, by channel: (latents - shift) · scale.

    Attributes:
        shift: of each channel, or one of all.
        scale: of each channel, or one of all.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, vae: ModelMixin) -> LatentScaling:
        """What diffusers' pipelines read off a VAE.

        That is its config's scaling_factor and shift_factor (Stable Diffusion, Flux, Sana), latents_mean and
        latents_std by channel (Wan, QwenImage; buffers in LTX), or the statistics of its BatchNorm (Flux.2).
        """
        if isinstance(getattr(vae, "bn", None), nn.BatchNorm2d):
            deviation = (vae.bn.running_var.double() + vae.config.batch_norm_eps).sqrt()
            return cls(tuple(vae.bn.running_mean.tolist()), tuple((1 / deviation).tolist()))
        factor = vae.config.get("scaling_factor") or 1.0
        means, deviations = (_statistics(vae, name) for name in ("latents_mean", "latents_std"))
        if means and deviations:
            return cls(tuple(means), tuple(factor / deviation for deviation in deviations))
        return cls((vae.config.get("shift_factor") or 0.0,), (factor,))

    def normalise(self, latents: Tensor) -> Tensor:
        """A VAE's latents (B, C, ...) as a denoiser sees them."""
        return (latents - _by_channel(self.shift, latents)) * _by_channel(self.scale, latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents / _by_channel(self.scale, latents) + _by_channel(self.shift, latents)


class LatentSpace:
    """Latents (B, C, h, w), or (B, C, F, h, w) of a VAE for videos, to which an image is a video of one frame.

    Args:
        vae: any of diffusers that encodes to a normal distribution, or to the latents themselves.
    """

    def __init__(self, vae: ModelMixin) -> None:
        self.vae, self.scaling = vae, LatentScaling.of(vae)
        self.is_for_videos = any(isinstance(module, nn.Conv3d) for module in vae.modules())
        # Flux.2's BatchNorm sees patches of latents, and so does its denoiser.
        self.patch_size: int = vae.config.patch_size[0] if hasattr(vae, "bn") else 1

    @torch.no_grad()
    def parts(self, images: Tensor) -> list[Tensor]:
        """Means and log-variances of the latents, (B, C, h, w) each; of a VAE without a distribution the latents alone.

        Args:
            images: (B, 3, H, W), or (B, 3, F, H, W), in [-1, 1], on the VAE's device.

        Raises:
            ValueError: the VAE gives neither.
        """
        if self.is_for_videos and images.ndim == 4:
            images = images[:, :, None]
        encoded = self.vae.encode(images, return_dict=False)[0]
        if not isinstance(encoded, Tensor) and not hasattr(encoded, "logvar"):
            raise ValueError(f"a {type(self.vae).__name__} gives no means and log-variances, nor latents")
        parts = [encoded] if isinstance(encoded, Tensor) else [encoded.mean, encoded.logvar]
        return [_patchify(part, self.patch_size) for part in parts]

    def encode(self, images: Tensor) -> Tensor:
        """The moments of latents, before any scaling: `parts` in one tensor, (B, 2C, h, w) or (B, C, h, w)."""
        return torch.cat(self.parts(images), dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents as images in [-1, 1], (B, 3, H, W); videos of several frames as (B, 3, F, H, W)."""
        latents = _unpatchify(self.denormalise(latents), self.patch_size)
        if self.is_for_videos and latents.ndim == 4:
            latents = latents[:, :, None]
        images = self.vae.decode(latents, return_dict=False)[0]
        return images[:, :, 0] if images.ndim == 5 and images.shape[2] == 1 else images

    def normalise(self, latents: Tensor) -> Tensor:
        """A VAE's latents (B, C, ...) as a denoiser sees them."""
        return self.scaling.normalise(latents)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return self.scaling.denormalise(latents)


def sample_latents(moments: Tensor, noise: Tensor | None) -> Tensor:
    """Latents (B, C, ...) from moments, (B, 2C, ...) of a normal distribution or (B, C, ...) of none.

    Args:
        moments: of `LatentSpace.encode`.
        noise: (B, C, ...) standard normal; None where the moments are the latents.
    """
    if noise is None or moments.shape[1] == noise.shape[1]:
        return moments
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (0.5 * log_variance).exp() * noise


def load_vae(path: str) -> ModelMixin:
    """A VAE from a model folder, the `vae` of a pipeline folder, or by its hub name; float32, frozen.

    Raises:
        UserError: there is none.
    """
    try:
        if not (Path(path).exists() or try_hub(path)):
            raise ValueError("no such folder here")
        vae = _vae_class(path).from_pretrained(path, subfolder=_subfolder(path), use_safetensors=True)
        check_weights(vae)
    except Exception as error:  # diffusers raises errors of any kind on damaged files
        raise UserError(
            f"{path}: cannot be loaded ({one_line(error)}); give a folder or hub name of a diffusers VAE"
        ) from None
    if not (hasattr(vae, "encode") and hasattr(vae, "decode")):
        raise UserError(
            f"{path}: a {type(vae).__name__} is no VAE; give one of diffusers, such as an AutoencoderKL"
        )
    return vae.eval().requires_grad_(False)


def _vae_class(path: str) -> Any:
    """Of diffusers whatever the config says, but for the one class that diffusers has not."""
    config = Path(path) / (_subfolder(path) or "") / "config.json"
    own = config.is_file() and read_json(config).get("_class_name") == PooledAutoencoderTiny.__name__
    return PooledAutoencoderTiny if own else AutoModel


def _subfolder(path: str) -> str | None:
    """Where the VAE lies: in a pipeline, here or on the hub, in its own folder."""
    if Path(path).is_dir():
        return "vae" if (Path(path) / "vae").is_dir() else None
    try:
        pipeline = find_pipeline(path)
    except UserError:  # on the hub, but no pipeline
        return None
    return "vae" if pipeline is not None and pipeline.has("vae") else None


def _by_channel(values: tuple[float, ...], latents: Tensor) -> Tensor:
    return latents.new_tensor(values).view(-1, *[1] * (latents.ndim - 2))


def _statistics(vae: ModelMixin, name: str) -> list[float] | None:
    """Numbers by channel: a buffer, else of the config."""
    buffer = dict(vae.named_buffers()).get(name)
    return vae.config.get(name) if buffer is None else buffer.tolist()


def _patchify(latents: Tensor, size: int) -> Tensor:
    """(B, C, h, w) to (B, C·size², h/size, w/size), as Flux.2's pipeline does."""
    return latents if size == 1 else nn.functional.pixel_unshuffle(latents, size)


def _unpatchify(latents: Tensor, size: int) -> Tensor:
    """The inverse of `_patchify`."""
    return latents if size == 1 else nn.functional.pixel_shuffle(latents, size)
