"""The forward process and the regression that trains a denoiser (Ho et al. 2020, Salimans and Ho 2022)."""

from __future__ import annotations

from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from shd_diffusion.config import DiffusionConfig


def noise_schedule(config: DiffusionConfig) -> DDPMScheduler:
    """The forward process as a diffusers scheduler; samplers take its config over."""
    return DDPMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.objective,
        clip_sample=False,
    )


def regression_target(schedule: DDPMScheduler, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the denoiser should predict under the schedule's objective, (B, C, H, W)."""
    match schedule.config["prediction_type"]:
        case "epsilon":
            return noise
        case "sample":
            return clean
        case "v_prediction":
            return schedule.get_velocity(clean, noise, timesteps)
        case other:
            raise ValueError(f"unknown objective `{other}`")


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over all elements, in float32: the denoising loss, and output KD with the teacher as the target."""
    return F.mse_loss(prediction.float(), target.float())
