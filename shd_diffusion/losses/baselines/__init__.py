"""What SHD is compared with: other ways to distil features or attention, each a term of the loss."""

from __future__ import annotations

import torch
from diffusers import ModelMixin

from shd_diffusion.config import LossesConfig
from shd_diffusion.losses.baselines.aligner import HeadAligner
from shd_diffusion.losses.baselines.attention_mse import AttentionMSE
from shd_diffusion.losses.baselines.attention_output import AttentionOutput
from shd_diffusion.losses.baselines.captured import Baseline, Captured
from shd_diffusion.losses.baselines.features import FeatureDistillation
from shd_diffusion.losses.baselines.vkd import VkD

BASELINES: dict[str, type[Baseline]] = {
    "features": FeatureDistillation,
    "vkd": VkD,
    "attention_output": AttentionOutput,
    "attention_mse": AttentionMSE,
    "aligner": HeadAligner,
}
"""By their section in `losses`."""


def build_baselines(
    losses: LossesConfig, teacher: ModelMixin, student: ModelMixin, seed: int
) -> dict[str, Baseline]:
    """The baselines whose weight is not 0, with parameters that follow from the seed.

    Raises:
        ValueError: one cannot be computed for these models; the message begins with its section.
    """
    built: dict[str, Baseline] = {}
    for name, kind in BASELINES.items():
        config = getattr(losses, name)
        if not config.weight:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                built[name] = kind(config, teacher, student)
            except ValueError as error:
                raise ValueError(f"losses.{name}: {error}") from error
    return built


__all__ = ["BASELINES", "Baseline", "Captured", "build_baselines"]
