"""The regression that trains a denoiser: L_simple (Ho et al. 2020, eq. 14), weighed by timestep if asked for."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from shd_diffusion.losses.term import StepOutputs, Term, TermConfig


class DenoiseConfig(TermConfig):
    """With `min_snr_gamma` each sample is weighed by min(SNR, γ) (Hang et al. 2023, section 3.4)."""

    min_snr_gamma: float | None = Field(None, gt=0, allow_inf_nan=False)


class Denoise(Term):
    """Mean squared error of the prediction from what the forward process has to say: noise, image or velocity."""

    Config: ClassVar[type[TermConfig]] = DenoiseConfig
    default_weight = 1.0
    needs_teacher = False
    reaches_output = True
    config: DenoiseConfig

    def forward(self, outputs: StepOutputs) -> Tensor:
        process, batch, gamma = outputs.process, outputs.batch, self.config.min_snr_gamma
        target = process.target(batch.clean, batch.noise, batch.timesteps)
        weights = None if gamma is None else process.min_snr_weight(batch.timesteps, gamma)
        return squared_error(outputs.prediction[:, : outputs.channels], target, weights)


def squared_error(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of (B, ...) in float32 or better, each sample with its weight (B,)."""
    wide = prediction.double() if prediction.dtype.itemsize == 8 else prediction.float()
    by_sample = (wide - target.to(wide)).square().flatten(1).mean(1)
    return (by_sample if weights is None else by_sample * weights.to(by_sample)).mean()
