"""What a step minimises: the terms of the loss, each a scalar by name, and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.config import DiffusionConfig, LossesConfig
from shd_diffusion.losses import SHDLoss, schedule_weight
from shd_diffusion.losses.denoising import ForwardProcess, squared_error
from shd_diffusion.losses.variance import variational_bound
from shd_diffusion.models.adapter import predict
from shd_diffusion.training.draws import Draws


@dataclass(frozen=True)
class Batch:
    """A noised batch: clean, noise and noised (B, C, H, W), timesteps, times and labels (B,).

    Timesteps count the forward process; times are what the denoiser is told of them.
    """

    clean: Tensor
    noise: Tensor
    noised: Tensor
    timesteps: Tensor
    times: Tensor
    labels: Tensor


def make_batch(process: ForwardProcess, clean: Tensor, labels: Tensor, draws: Draws, null: int) -> Batch:
    """Noise the images at their timesteps and drop the labels that are to be dropped."""
    return Batch(
        clean=clean,
        noise=draws.noise,
        noised=process.noised(clean, draws.noise, draws.timesteps),
        timesteps=draws.timesteps,
        times=process.times(draws.timesteps),
        labels=labels.masked_fill(draws.dropped, null),
    )


class DenoisingLoss:
    """L_simple, weighed by timestep if asked for, and L_vlb where the variance is learned."""

    def __init__(self, process: ForwardProcess, config: DiffusionConfig) -> None:
        self.process, self.config = process, config

    def __call__(self, prediction: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The terms `denoise` and, with a learned variance, `variance`."""
        gamma, channels = self.config.min_snr_gamma, batch.clean.shape[1]
        weights = None if gamma is None else self.process.min_snr_weight(batch.timesteps, gamma)
        target = self.process.target(batch.clean, batch.noise, batch.timesteps)
        terms = {"denoise": squared_error(prediction[:, :channels], target, weights)}
        if self.config.learned_variance:
            terms["variance"] = variational_bound(
                self.process, prediction, batch.clean, batch.noised, batch.timesteps
            )
        return terms


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

    def __init__(self, denoising: DenoisingLoss) -> None:
        self.denoising = denoising

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        return self.denoising(predict(model, batch.noised, batch.times, batch.labels), batch)

    def weights(self, step: int) -> dict[str, float]:
        return {"denoise": 1.0, "variance": 1.0}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class Distillation:
    """L = w_denoise · L_denoise + w_output · ||ε_student - ε_teacher||² + w_shd · L_SHD (METHOD.md section 6).

    Teacher and student see the same noised images, timesteps, labels and dropped labels. A term of weight 0
    is not computed; without a term that needs it, neither is the teacher's forward pass.

    Args:
        denoising: the denoising loss.
        teacher: frozen, in evaluation mode.
        captures: open captures of the teacher and of the student; None where SHD is left out.
        shd: the SHD loss; None where it is left out.
        losses: the weights.
        max_steps: where a decaying weight ends.
    """

    def __init__(
        self,
        denoising: DenoisingLoss,
        teacher: nn.Module,
        captures: tuple[AttentionCapture, AttentionCapture] | None,
        shd: SHDLoss | None,
        losses: LossesConfig,
        max_steps: int,
    ) -> None:
        self.denoising, self.teacher, self.captures, self.shd = denoising, teacher, captures, shd
        self.losses, self.max_steps = losses, max_steps

    def __call__(self, model: nn.Module, batch: Batch, step: int) -> dict[str, Tensor]:
        weights = self.weights(step)
        if weights["output"] or weights["shd"]:
            with torch.no_grad():
                taught = predict(self.teacher, batch.noised, batch.times, batch.labels)
        prediction = predict(model, batch.noised, batch.times, batch.labels)
        terms = {name: term for name, term in self.denoising(prediction, batch).items() if weights[name]}
        if weights["output"]:
            channels = min(prediction.shape[1], taught.shape[1])
            terms["output"] = squared_error(prediction[:, :channels], taught[:, :channels])
        if weights["shd"] and self.shd is not None and self.captures is not None:
            of_teacher, of_student = self.captures
            terms["shd"] = self.shd(
                of_teacher.records, of_student.records, step=step, timesteps=batch.timesteps
            )
        return terms

    def weights(self, step: int) -> dict[str, float]:
        shd = self.losses.shd
        return {
            "denoise": self.losses.denoise.weight,
            "variance": self.losses.variance.weight,
            "output": self.losses.output.weight,
            "shd": schedule_weight(shd.weight, step, self.max_steps, shd.decay, shd.every),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.shd.state_dict() if self.shd is not None else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.shd is not None:
            self.shd.load_state_dict(state)
