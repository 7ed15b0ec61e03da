"""The training losses against what the code of facebookresearch/DiT and sail-sg/MDT computes (tests/data/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shd_diffusion.losses.denoise import Denoise, DenoiseConfig
from shd_diffusion.losses.term import Batch, StepOutputs, TermConfig
from shd_diffusion.losses.variance import Variance, variational_bound
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.trace import Trace

RECORDED = load_file(Path(__file__).parents[1] / "data" / "losses.safetensors")
CLEAN, NOISE, PREDICTION, TIMESTEPS = (RECORDED[k] for k in ("clean", "noise", "prediction", "timesteps"))
SAMPLES = range(len(TIMESTEPS))
AUTHORS = {"dit": None, "mdt": 5.0}  # and the γ of their min-SNR weights

authors = pytest.mark.parametrize("author", AUTHORS)


PROCESS = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))
STUDENT = Trace(CLEAN.shape[1:], {}, PREDICTION[:1])  # predicts a variance


def term_of(name: str, gamma: float | None, sample: int) -> Tensor:
    """A term of a batch of one sample."""
    part = slice(sample, sample + 1)
    clean, noise, timesteps = CLEAN[part], NOISE[part], TIMESTEPS[part]
    batch = Batch(clean, noise, PROCESS.noised(clean, noise, timesteps), timesteps, {})
    term = {
        "denoise": Denoise(DenoiseConfig(min_snr_gamma=gamma), STUDENT, None),
        "variance": Variance(TermConfig(), STUDENT, None),
    }[name]
    return term(StepOutputs(PROCESS, batch, PREDICTION[part]))


@authors
def test_noising(author: str) -> None:
    noised = PROCESS.noised(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(noised, RECORDED[f"{author}/noised"], rtol=0, atol=1e-5)


@authors
@pytest.mark.parametrize(("term", "theirs"), [("denoise", "mse"), ("variance", "vb")])
def test_terms_of_every_timestep(author: str, term: str, theirs: str) -> None:
    """L_simple, with MDT weighed by min-SNR, and L_vlb; two of the timesteps are the first one, with its likelihood."""
    found = torch.stack([term_of(term, AUTHORS[author], sample) for sample in SAMPLES])
    torch.testing.assert_close(found, RECORDED[f"{author}/{theirs}"], rtol=1e-5, atol=1e-8)


@authors
def test_the_bound_trains_the_variance_alone(author: str) -> None:
    prediction = PREDICTION.clone().requires_grad_()
    noised = PROCESS.noised(CLEAN, NOISE, TIMESTEPS)
    variational_bound(PROCESS, prediction, CLEAN, noised, TIMESTEPS).backward()
    mean, variance = prediction.grad.chunk(2, dim=1)
    assert not mean.any() and variance.flatten(1).any(1).all()
    torch.testing.assert_close(prediction.grad, RECORDED[f"{author}/vb_gradient"], rtol=1e-4, atol=1e-8)


def test_the_bound_is_finite_whatever_is_predicted() -> None:
    noised = PROCESS.noised(CLEAN, NOISE, TIMESTEPS)
    prediction = torch.cat([100 * PREDICTION[:, :3], 3 * PREDICTION[:, 3:]], 1).requires_grad_()
    bound = variational_bound(PROCESS, prediction, CLEAN, noised, TIMESTEPS)
    bound.backward()
    assert bound.isfinite() and prediction.grad.isfinite().all()
