"""The variational bound that trains a predicted variance (Nichol and Dhariwal 2021, sections 2.1 and 3.1).

With L_simple it makes their hybrid loss. The mean is a constant here: the bound trains the variance alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shd_diffusion.losses.term import StepOutputs, Term
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.trace import Trace


class Variance(Term):
    """The variational bound, where the model predicts a variance beside its objective."""

    default_weight = 1.0
    needs_teacher = False
    reaches_output = True

    @classmethod
    def applies(cls, student: Trace) -> bool:
        return student.predicts_variance

    def forward(self, outputs: StepOutputs) -> Tensor:
        batch = outputs.batch
        return variational_bound(
            outputs.process, outputs.prediction, batch.clean, batch.noised, batch.timesteps
        )


def variational_bound(
    process: ForwardProcess, prediction: Tensor, clean: Tensor, noised: Tensor, timesteps: Tensor
) -> Tensor:
    """The bound's term of each sample's timestep, in bits per dimension, averaged: a scalar.

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at the first timestep -log p(x_0 | x_1) over 8-bit levels.

    Args:
        process: the forward process.
        prediction: (B, 2C, H, W); the objective's prediction, then v in [-1, 1], which interpolates the log
            variance between the posterior's and the forward process's (eq. 15).
        clean: (B, C, H, W).
        noised: (B, C, H, W).
        timesteps: (B,).
    """
    mean, fraction = prediction.float().chunk(2, dim=1)
    mean, clean, noised = mean.detach(), clean.float(), noised.float()
    by_sample = (-1, *[1] * (noised.ndim - 1))
    of_clean, of_noised, smallest, largest = (
        part.to(noised.device)[timesteps].to(noised).view(by_sample) for part in _posterior(process)
    )
    estimate = process.clean(noised, mean, timesteps)
    log_variance = torch.lerp(smallest, largest, (fraction + 1) / 2)
    p_mean = of_clean * estimate + of_noised * noised
    q_mean = of_clean * clean + of_noised * noised
    kl = 0.5 * (log_variance - smallest - 1 + (smallest - log_variance).exp())
    kl = kl + 0.5 * (q_mean - p_mean) ** 2 * (-log_variance).exp()
    first = -_log_likelihood_of_levels(clean, p_mean, 0.5 * log_variance)
    return torch.where(timesteps.view(by_sample) == 0, first, kl).mean() / math.log(2)


def _posterior(process: ForwardProcess) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of q(x_{t-1} | x_t, x_0) (eq. 10, 11), by timestep: factors of x_0 and x_t in the mean, log variance; and
    the log variance of the forward process. At the first timestep the posterior is a point: the next one serves."""
    assert process.table is not None, "a flow has no posterior variance"
    cumulative = process.table[0] ** 2  # ᾱ_t
    previous = torch.cat([cumulative.new_ones(1), cumulative[:-1]])
    beta = 1 - cumulative / previous
    variance = beta * (1 - previous) / (1 - cumulative)
    of_clean = beta * previous.sqrt() / (1 - cumulative)
    of_noised = (1 - previous) * (1 - beta).sqrt() / (1 - cumulative)
    return of_clean, of_noised, torch.cat([variance[1:2], variance[1:]]).log(), beta.log()


def _log_likelihood_of_levels(clean: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, under a Gaussian, of the 8-bit level that each value in [-1, 1] stands for."""
    half = 1 / 255
    upper = _normal_cdf((clean - mean + half) * (-log_scale).exp())
    lower = _normal_cdf((clean - mean - half) * (-log_scale).exp())
    inside = (upper - lower).clamp(min=1e-12)
    darkest, brightest = upper.clamp(min=1e-12), (1 - lower).clamp(min=1e-12)
    return torch.where(clean < -0.999, darkest, torch.where(clean > 0.999, brightest, inside)).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Page's approximation (1977), which the published models were trained with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
