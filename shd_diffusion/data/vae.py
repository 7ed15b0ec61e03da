"""A diffusers VAE as an encoder: from images to the moments of their latents."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from diffusers import AutoModel, ModelMixin
from torch import Tensor

from shd_diffusion.errors import UserError


def load_vae(path: str) -> ModelMixin:
    """A VAE from a model folder, the `vae` of a pipeline folder, or by its hub name; float32, frozen.

    Raises:
        UserError: there is none, or it has no mean and variance to give.
    """
    try:
        subfolder = "vae" if (Path(path) / "vae").is_dir() else None
        vae = AutoModel.from_pretrained(path, subfolder=subfolder, use_safetensors=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: cannot be loaded ({reason}); give a folder or hub name of a diffusers VAE"
        ) from None
    if not hasattr(vae, "encode") or "latent_channels" not in vae.config:
        raise UserError(f"{path}: a {type(vae).__name__} gives no means and variances; take an AutoencoderKL")
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_moments(vae: ModelMixin, images: Tensor) -> Tensor:
    """Mean and log-variance of the latents, before any scaling: (B, 2C, h, w).

    Args:
        images: (B, 3, H, W) in [-1, 1], on the VAE's device.
    """
    latents = vae.encode(images).latent_dist
    return torch.cat([latents.mean, latents.logvar], dim=1)


def hash_model(model: ModelMixin) -> str:
    """SHA-256 of a model's config and weights; where it was loaded from does not matter."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().flatten().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
