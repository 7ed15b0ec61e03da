"""The forward process: how images are noised, and what the denoiser predicts.

Noising is linear in image and noise, x_t = a_t · x + s_t · n, for diffusion (Ho et al. 2020: a_t² + s_t² = 1)
and for rectified flow (Liu et al. 2023: a_t = 1 - s_t) alike; so every objective is a line in this file.

Which process it is, a diffusers scheduler says: a teacher's own, or that of a config.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from pydantic import Field, model_validator
from torch import Tensor

from shd_diffusion.section import Section

Objective = Literal["epsilon", "v_prediction", "sample", "flow"]
DIFFUSION_ONLY = ("beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")


class DiffusionConfig(Section):
    """The forward process, and what the denoiser predicts. A key that is left out is the teacher's, or the default.

    `flow` is rectified flow in continuous time: straight paths from image to noise, σ = shift·u / (1 + (shift - 1)·u)
    of a uniform u; every other objective a diffusion by its `beta_schedule`, whose betas of 1,000 steps are scaled
    by 1000 / `num_train_timesteps` (as ADM does it) unless `beta_start` and `beta_end` are given.
    """

    objective: Objective | None = None
    num_train_timesteps: int | None = Field(None, ge=2)
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    beta_start: float | None = Field(None, gt=0, lt=1)
    beta_end: float | None = Field(None, gt=0, lt=1)
    rescale_betas_zero_snr: bool | None = None
    shift: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _keys_belong_to_the_objective(self) -> DiffusionConfig:
        foreign = DIFFUSION_ONLY if self.objective == "flow" else ("shift",) if self.objective else ()
        for key in foreign:
            if getattr(self, key) is not None:
                raise ValueError(f"`{key}` means nothing to the objective `{self.objective}`; remove it")
        return self


@dataclass(frozen=True)
class ForwardProcess:
    """How images are noised, and what the denoiser predicts.

    Timesteps (B,) are what the denoiser is told: whole numbers in 0..T-1 of a diffusion, σ·T of a flow.

    Attributes:
        objective: what the denoiser predicts.
        num_timesteps: T.
        scheduler: the same process as diffusers' sampling schedulers know it.
        shift: of a flow.
        table: of a diffusion, a_t and s_t of each timestep, (2, T), float64.
    """

    objective: Objective
    num_timesteps: int
    scheduler: SchedulerMixin
    shift: float = 1.0
    table: Tensor | None = None
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def timesteps(self, shares: Tensor) -> Tensor:
        """Timesteps for shares u (B,) of the schedule, 0 <= u < 1."""
        if self.table is not None:
            return (shares * self.num_timesteps).long()
        sigmas = self.shift * shares / (1 + (self.shift - 1) * shares)
        return (sigmas * self.num_timesteps).float()

    def shares(self, timesteps: Tensor) -> Tensor:
        """The shares (B,) of the schedule at which timesteps lie, float64: the inverse of `timesteps`."""
        sigmas = timesteps.double() / self.num_timesteps
        return sigmas if self.table is not None else sigmas / (self.shift - (self.shift - 1) * sigmas)

    def noised(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t, (B, C, H, W), for the timesteps (B,)."""
        a, s = self.scales(timesteps, clean)
        return a * clean + s * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the denoiser should predict, (B, C, H, W)."""
        a, s = self.scales(timesteps, clean)
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
        a, s = self.scales(timesteps, noised)
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
        a, s = self._scales(timesteps)
        match self.objective:  # written so that a = 0 and s = 0 have their limits
            case "epsilon":
                weight = (gamma * s**2 / a**2).clamp(max=1)
            case "sample":
                weight = (a**2 / s**2).clamp(max=gamma)
            case _:
                weight = torch.minimum(a**2, gamma * s**2)
        return weight.float()

    def truncated_snr_weight(self, timesteps: Tensor) -> Tensor:
        """Truncated SNR weights (Salimans and Ho 2022, section 4): max(SNR, 1) on the image's squared error, (B,).

        See `min_snr_weight`; where there is no signal at all, the weight of a noise prediction's error is infinite.
        """
        a, s = self._scales(timesteps)
        match self.objective:
            case "epsilon":
                weight = (s**2 / a**2).clamp(min=1)
            case "sample":
                weight = (a**2 / s**2).clamp(min=1)
            case _:
                weight = torch.maximum(a**2, s**2)
        return weight.float()

    def scales(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and s_t of the timesteps (B,), each (B, 1, 1, 1) as `like`."""
        a, s = (scale.to(like).view(-1, *[1] * (like.ndim - 1)) for scale in self._scales(timesteps))
        return a, s

    def _scales(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) each, float64; the table stays on the device, so that looking up waits for nothing."""
        if self.table is None:
            sigmas = timesteps.double() / self.num_timesteps
            return 1 - sigmas, sigmas
        table = self._on_device.get(timesteps.device)
        if table is None:
            table = self._on_device[timesteps.device] = self.table.to(timesteps.device)
        a, s = table[:, timesteps]
        return a, s

    @classmethod
    def from_scheduler(cls, scheduler: SchedulerMixin) -> ForwardProcess:
        """The process that a diffusers scheduler samples the reverse of.

        Raises:
            ValueError: it samples another kind of process (such as EDM's, whose σ is no mixture of image and noise).
        """
        settings = settings_of(scheduler)
        steps = settings["num_train_timesteps"]
        if settings["objective"] == "flow":
            return cls("flow", steps, scheduler, settings["shift"])
        # All of diffusers' schedulers of one config have the same betas; not all keep them (EDM's, Euler's sigmas).
        betas = _ddpm(settings, scheduler.config.get("trained_betas")).betas.double()
        cumulative = (1 - betas).cumprod(0)
        own = getattr(scheduler, "alphas_cumprod", None)
        # CogView3's and CogVideoX' shift their SNR; with zero SNR the last one of others is not quite 0
        if isinstance(own, Tensor) and (own.double().sqrt() - cumulative.sqrt()).abs().max() > 1e-3:
            cumulative = own.double()
        table = torch.stack([cumulative.sqrt(), (1 - cumulative).sqrt()])
        return cls(settings["objective"], steps, scheduler, table=table)


def make_scheduler_of_process(config: DiffusionConfig, learned_variance: bool = False) -> SchedulerMixin:
    """The scheduler of a config's process; what the config leaves open has the usual value.

    Args:
        learned_variance: the denoiser predicts a variance too.
    """
    steps = config.num_train_timesteps or 1000
    if config.objective == "flow":
        return FlowMatchEulerDiscreteScheduler(steps, shift=config.shift or 1.0)
    usual = (1e-4, 0.02) if config.beta_schedule != "scaled_linear" else (0.00085, 0.012)
    first, last = (min(beta * 1000 / steps, 0.999) for beta in usual)
    settings = {
        "objective": config.objective or "epsilon",
        "num_train_timesteps": steps,
        "beta_schedule": config.beta_schedule or "linear",
        "beta_start": config.beta_start or first,
        "beta_end": config.beta_end or last,
        "rescale_betas_zero_snr": config.rescale_betas_zero_snr or False,
    }
    return _ddpm(settings, None, "learned_range" if learned_variance else "fixed_small")


def settings_of(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What a scheduler says of the forward process, by the keys of `DiffusionConfig`.

    Raises:
        ValueError: it is of another kind of process.
    """
    config, name = scheduler.config, type(scheduler).__name__
    flows = (
        name.startswith("FlowMatch")
        or config.get("use_flow_sigmas")
        or config.get("prediction_type") == "flow_prediction"
    )
    steps = config.get("num_train_timesteps")
    if steps is None or not (flows or "beta_schedule" in config):
        raise ValueError(f"{name} samples a process that is neither a diffusion by betas nor a flow")
    if config.get("invert_sigmas"):
        raise ValueError(f"{name} counts from noise to images (`invert_sigmas`), which is not known here")
    if flows:
        shift = config.get("shift", config.get("flow_shift")) or 1.0
        return {"objective": "flow", "num_train_timesteps": steps, "shift": float(shift)}
    return {
        "objective": config.get("prediction_type", "epsilon"),
        "num_train_timesteps": steps,
        "beta_schedule": config["beta_schedule"],
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 0.02),
        "rescale_betas_zero_snr": bool(config.get("rescale_betas_zero_snr")),
    }


def shifts_by_size(scheduler: SchedulerMixin) -> bool:
    """Whether a flow's shift is the pipeline's affair, which tells its scheduler one for the size of the images."""
    return bool(scheduler.config.get("use_dynamic_shifting"))


def differing_settings(config: DiffusionConfig, scheduler: SchedulerMixin) -> dict[str, tuple[Any, Any]]:
    """The keys that a config sets otherwise than a scheduler: its value, and the scheduler's (None if it has none).

    A scheduler that shifts by the size of images (`use_dynamic_shifting`) does not heed its own shift, nor says one.
    """
    present = settings_of(scheduler)
    wanted = config.model_dump(exclude_none=True, exclude={"shift"} if shifts_by_size(scheduler) else set())
    return {
        key: (value, present.get(key)) for key, value in wanted.items() if not _same(value, present.get(key))
    }


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, float) and isinstance(other, int | float):
        return math.isclose(value, other, rel_tol=1e-9)
    return bool(value == other)


def _ddpm(settings: dict[str, Any], trained_betas: Any, variance_type: str = "fixed_small") -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=settings["num_train_timesteps"],
        beta_start=settings["beta_start"],
        beta_end=settings["beta_end"],
        beta_schedule=settings["beta_schedule"],
        trained_betas=trained_betas,
        rescale_betas_zero_snr=settings["rescale_betas_zero_snr"],
        prediction_type=settings["objective"],
        clip_sample=False,
        variance_type=variance_type,
    )
