"""What a step minimises: the terms of the loss, each a scalar by name, and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.config import LossesConfig
from shd_diffusion.losses import SHDLoss
from shd_diffusion.losses.denoising import mean_squared_error, regression_target
from shd_diffusion.models.adapter import predict
from shd_diffusion.training.draws import Draws


@dataclass(frozen=True)
class Batch:
    """A noised batch: noised and target (B, C, H, W), timesteps and labels (B,)."""

    noised: Tensor
    target: Tensor
    timesteps: Tensor
    labels: Tensor


def make_batch(schedule: DDPMScheduler, clean: Tensor, labels: Tensor, draws: Draws, null: int) -> Batch:
    """Noise the images at their timesteps and drop the labels that are to be dropped."""
    return Batch(
        noised=schedule.add_noise(clean, draws.noise, draws.timesteps),
        target=regression_target(schedule, clean, draws.noise, draws.timesteps),
        timesteps=draws.timesteps,
        labels=labels.masked_fill(draws.dropped, null),
    )


class Method(Protocol):
    """A way to train a denoiser."""

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        """The unweighted terms of a batch."""

    def weights(self, step: int) -> dict[str, float]:
        """The weight of every term at a step."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Denoising:
    """The denoising loss alone: how a teacher is trained."""

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        prediction = predict(model, batch.noised, batch.timesteps, batch.labels)
        return {"denoise": _denoising_term(prediction, batch)}

    def weights(self, step: int) -> dict[str, float]:
        return {"denoise": 1.0}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class Distillation:
    """L = w_denoise · L_denoise + w_output · ||ε_student - ε_teacher||² + w_shd · L_SHD (METHOD.md section 6).

    Teacher and student see the same noised images, timesteps, labels and dropped labels. A term of weight 0
    is not computed; without a term that needs it, neither is the teacher's forward pass.

    Args:
        teacher: frozen, in evaluation mode.
        captures: open captures of the teacher and of the student; None where SHD is left out.
        shd: the SHD loss; None where it is left out.
        losses: the weights.
    """

    def __init__(
        self,
        teacher: nn.Module,
        captures: tuple[AttentionCapture, AttentionCapture] | None,
        shd: SHDLoss | None,
        losses: LossesConfig,
    ) -> None:
        self.teacher, self.captures, self.shd, self.losses = teacher, captures, shd, losses

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        terms = {}
        if self.losses.output.weight or self.shd is not None:
            with torch.no_grad():
                taught = predict(self.teacher, batch.noised, batch.timesteps, batch.labels)
        prediction = predict(model, batch.noised, batch.timesteps, batch.labels)
        if self.losses.denoise.weight:
            terms["denoise"] = _denoising_term(prediction, batch)
        if self.losses.output.weight:
            terms["output"] = mean_squared_error(prediction, taught)
        if self.shd is not None and self.captures is not None:
            of_teacher, of_student = self.captures
            terms["shd"] = self.shd(of_teacher.records, of_student.records, step=step, timesteps=batch.timesteps)
        return terms

    def weights(self, step: int) -> dict[str, float]:
        return {
            "denoise": self.losses.denoise.weight,
            "output": self.losses.output.weight,
            "shd": self.losses.shd.weight,
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.shd.state_dict() if self.shd is not None else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.shd is not None:
            self.shd.load_state_dict(state)


def _denoising_term(prediction: Tensor, batch: Batch) -> Tensor:
    return mean_squared_error(prediction[:, : batch.target.shape[1]], batch.target)
