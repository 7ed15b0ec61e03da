"""What is random in a training step, drawn for all processes at once from (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shd_diffusion.models.mdtv2 import draw_ids_keep
from shd_diffusion.randomness import generator


@dataclass(frozen=True)
class Draws:
    """B samples of one step: noise (B, C, H, W), timesteps (B,), and which labels are dropped (B,).

    Beside these, what the data need: which samples are flipped (B,), and the noise (B, C, H, W) that a latent is
    sampled with, where there are latents; and for masked training the tokens that are kept (B, K).
    """

    noise: Tensor
    timesteps: Tensor
    dropped: Tensor
    flipped: Tensor
    latent_noise: Tensor | None
    ids_keep: Tensor | None = None

    def take(self, share: slice, device: torch.device) -> Draws:
        """One process's share, on its device."""
        noise, timesteps, dropped, flipped = (
            part[share].to(device) for part in (self.noise, self.timesteps, self.dropped, self.flipped)
        )
        latent_noise, ids_keep = (
            None if part is None else part[share].to(device) for part in (self.latent_noise, self.ids_keep)
        )
        return Draws(noise, timesteps, dropped, flipped, latent_noise, ids_keep)


def draw(
    seed: int,
    step: int,
    count: int,
    shape: tuple[int, ...],
    num_timesteps: int,
    label_drop: float,
    latent_noise: bool = False,
    timestep_sampling: str = "uniform",
    masking: tuple[int, float] | None = None,
) -> Draws:
    """The draws of a step; teacher and student share them, and so do all variants of one seed.

    Timesteps are `uniform`, or `logit_normal` (Esser et al. 2024, section 3.1): sigmoid of a standard normal.
    Masking is the number of tokens and the least share of them to drop, see `draw_ids_keep`; None for none.
    """
    source = generator(seed, "step", step)
    return Draws(
        noise=torch.randn((count, *shape), generator=source),
        timesteps=_timesteps(count, num_timesteps, timestep_sampling, source),
        dropped=torch.rand(count, generator=source) < label_drop,
        flipped=torch.rand(count, generator=source) < 0.5,
        latent_noise=torch.randn((count, *shape), generator=source) if latent_noise else None,
        ids_keep=draw_ids_keep(count, *masking, source)
        if masking
        else None,  # last: nothing else depends on it
    )


def _timesteps(count: int, num_timesteps: int, sampling: str, source: torch.Generator) -> Tensor:
    if sampling == "uniform":
        return torch.randint(num_timesteps, (count,), generator=source)
    share = torch.randn(count, generator=source).sigmoid()
    return (share * num_timesteps).long().clamp(max=num_timesteps - 1)
