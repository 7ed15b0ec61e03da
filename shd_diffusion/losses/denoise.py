"""The forward process and the regression that trains a denoiser.

Noising is linear in image and noise, x_t = a_t · x + s_t · n, for diffusion (Ho et al. 2020: a_t² + s_t² = 1)
and for rectified flow (Liu et al. 2023: a_t = 1 - s_t) alike; so every objective is a line in this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from shd_diffusion.config import DiffusionConfig, Objective


@dataclass(frozen=True)
class ForwardProcess:
    """How images are noised, and what the denoiser predicts.

    Attributes:
        signal: a_t of each timestep, (T,), float64.
        noise: s_t of each timestep, (T,), float64.
        objective: what the denoiser predicts.
        scheduler: the same process as diffusers' sampling schedulers know it.
    """

    signal: Tensor
    noise: Tensor
    objective: Objective
    scheduler: SchedulerMixin

    @property
    def num_timesteps(self) -> int:
        return len(self.signal)

    def times(self, timesteps: Tensor) -> Tensor:
        """What the denoiser is told: the timestep, or for flow s_t · T, as diffusers' flow schedulers tell it."""
        return timesteps + 1 if self.objective == "flow" else timesteps

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t, (B, C, H, W), for the timesteps (B,)."""
        a, s = self._at(timesteps, clean)
        return a * clean + s * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, (B, C, H, W)."""
        a, s = self._at(timesteps, clean)
        match self.objective:
            case "epsilon":
                return noise
            case "sample":
                return clean
            case "v_prediction":  # Salimans and Ho 2022
                return a * noise - s * clean
            case "flow":  # the velocity dx_t/ds
                return noise - clean

    def clean(self, noised: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The image that a prediction stands for, (B, C, H, W)."""
        a, s = self._at(timesteps, noised)
        match self.objective:
            case "epsilon":
                return (noised - s * prediction) / a
            case "sample":
                return prediction
            case "v_prediction":
                return a * noised - s * prediction
            case "flow":
                return noised - s * prediction

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR weights (Hang et al. 2023, section 3.4): min(SNR, γ) on the image's squared error, (B,).

        A squared error of the prediction is one of the image times s²/a² (epsilon), s² (v, flow) or 1 (sample).
        """
        timesteps = timesteps.cpu()
        a, s = self.signal[timesteps], self.noise[timesteps]
        snr = (a / s) ** 2
        error = {"epsilon": 1 / snr, "sample": torch.ones_like(snr), "v_prediction": s**2, "flow": s**2}
        return (snr.clamp(max=gamma) * error[self.objective]).float()

    def _at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        a, s = (scale[timesteps.cpu()].to(like).view(shape) for scale in (self.signal, self.noise))
        return a, s


def forward_process(config: DiffusionConfig) -> ForwardProcess:
    """The forward process of a config."""
    steps = config.num_train_timesteps
    if config.objective == "flow":
        sigmas = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        return ForwardProcess(1 - sigmas, sigmas, config.objective, FlowMatchEulerDiscreteScheduler(steps))
    scheduler = DDPMScheduler(
        num_train_timesteps=steps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.objective,
        clip_sample=False,
        variance_type="learned_range" if config.learned_variance else "fixed_small",
    )
    cumulative = (1 - scheduler.betas.double()).cumprod(0)
    return ForwardProcess(cumulative.sqrt(), (1 - cumulative).sqrt(), config.objective, scheduler)


def squared_error(prediction: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error in float32, each sample with its weight (B,): the denoising loss, and output KD with the
    teacher's prediction as the target."""
    by_sample = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return (by_sample if weights is None else by_sample * weights.to(by_sample)).mean()
