"""The latent space of a VAE."""

from __future__ import annotations

from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.data.vae import hash_model as hash_model
from shd_diffusion.data.vae import load_vae as load_vae


class LatentSpace:
    """A stand-in with the interface of the latent space that the data room is getting."""

    def __init__(self, vae: ModelMixin) -> None:
        self.vae = vae

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return self.vae.decode(latents / self.vae.config.scaling_factor + shift).sample
