"""The training losses against what the code of facebookresearch/DiT and sail-sg/MDT computes (tests/data/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shd_diffusion.config import DiffusionConfig
from shd_diffusion.losses.denoising import forward_process
from shd_diffusion.losses.variance import variational_bound
from shd_diffusion.training.draws import Draws
from shd_diffusion.training.methods import DenoisingLoss, make_batch

RECORDED = load_file(Path(__file__).parents[1] / "data" / "losses.safetensors")
CLEAN, NOISE, PREDICTION, TIMESTEPS = (RECORDED[k] for k in ("clean", "noise", "prediction", "timesteps"))
SAMPLES = range(len(TIMESTEPS))
AUTHORS = {"dit": None, "mdt": 5.0}  # and the γ of their min-SNR weights

authors = pytest.mark.parametrize("author", AUTHORS)


def terms_of(prediction: Tensor, gamma: float | None, sample: int) -> dict[str, Tensor]:
    """The terms of a batch of one sample, by the way that a training step takes."""
    config = DiffusionConfig(learned_variance=True, min_snr_gamma=gamma)
    process, part = forward_process(config), slice(sample, sample + 1)
    never = torch.zeros(1, dtype=torch.bool)
    draws = Draws(NOISE[part], TIMESTEPS[part], never, never, None)
    batch = make_batch(process, CLEAN[part], torch.zeros(1, dtype=torch.long), draws, 0)
    return DenoisingLoss(process, config)(prediction[part], batch)


@authors
def test_noising(author: str) -> None:
    noised = forward_process(DiffusionConfig()).noised(CLEAN, NOISE, TIMESTEPS)
    torch.testing.assert_close(noised, RECORDED[f"{author}/noised"], rtol=0, atol=1e-5)


@authors
@pytest.mark.parametrize(("term", "theirs"), [("denoise", "mse"), ("variance", "vb")])
def test_terms_of_every_timestep(author: str, term: str, theirs: str) -> None:
    """L_simple, with MDT weighed by min-SNR, and L_vlb; two of the timesteps are the first one, with its likelihood."""
    found = torch.stack([terms_of(PREDICTION, AUTHORS[author], sample)[term] for sample in SAMPLES])
    torch.testing.assert_close(found, RECORDED[f"{author}/{theirs}"], rtol=1e-5, atol=1e-8)


@authors
def test_the_bound_trains_the_variance_alone(author: str) -> None:
    process = forward_process(DiffusionConfig(learned_variance=True))
    prediction = PREDICTION.clone().requires_grad_()
    noised = process.noised(CLEAN, NOISE, TIMESTEPS)
    variational_bound(process, prediction, CLEAN, noised, TIMESTEPS).backward()
    mean, variance = prediction.grad.chunk(2, dim=1)
    assert not mean.any() and variance.flatten(1).any(1).all()
    torch.testing.assert_close(prediction.grad, RECORDED[f"{author}/vb_gradient"], rtol=1e-4, atol=1e-8)


def test_the_bound_is_finite_whatever_is_predicted() -> None:
    process = forward_process(DiffusionConfig(learned_variance=True))
    noised = process.noised(CLEAN, NOISE, TIMESTEPS)
    prediction = torch.cat([100 * PREDICTION[:, :3], 3 * PREDICTION[:, 3:]], 1).requires_grad_()
    bound = variational_bound(process, prediction, CLEAN, noised, TIMESTEPS)
    bound.backward()
    assert bound.isfinite() and prediction.grad.isfinite().all()
