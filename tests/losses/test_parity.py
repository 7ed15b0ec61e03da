"""The training losses are those of facebookresearch/DiT and sail-sg/MDT (tests/golden/README.md)."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from golden.float64 import InFloat64
from safetensors.torch import load_file
from torch import Tensor

from shd_diffusion.losses.denoise import Denoise, DenoiseConfig
from shd_diffusion.losses.term import Batch, StepOutputs, TermConfig
from shd_diffusion.losses.variance import Variance, variational_bound
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.trace import Trace

RECORDED = load_file(Path(__file__).parents[1] / "golden" / "losses.safetensors")
CLEAN, NOISE, PREDICTION, TIMESTEPS = (RECORDED[k] for k in ("clean", "noise", "prediction", "timesteps"))
SAMPLES = range(len(TIMESTEPS))
AUTHORS = {"dit": None, "mdt": 5.0}  # and the γ of their min-SNR weights

authors = pytest.mark.parametrize("author", AUTHORS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def precision(dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    return InFloat64() if dtype == torch.float64 else contextlib.nullcontext()


def assert_near(found: Tensor, expected: Tensor, in_float32: float) -> None:
    """Equal but for rounding, relative to the largest value expected.

    Float64 leaves 2e-12 at most, where the bound takes small differences of numbers near 1. The tolerance in
    float32 is some five times its distance to float64.
    """
    tolerance = {torch.float64: 1e-10, torch.float32: in_float32}[found.dtype]
    assert ((found - expected).abs().max() / expected.abs().max()).item() < tolerance


def process() -> ForwardProcess:
    return ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))


STUDENT = Trace(CLEAN.shape[1:], {}, PREDICTION[:1])  # predicts a variance


def term_of(name: str, dtype: torch.dtype, gamma: float | None, sample: int) -> Tensor:
    """A term of a batch of one sample."""
    clean, noise, prediction = (part[sample : sample + 1].to(dtype) for part in (CLEAN, NOISE, PREDICTION))
    timesteps = TIMESTEPS[sample : sample + 1]
    batch = Batch(clean, noise, process().noised(clean, noise, timesteps), timesteps, {})
    term = {
        "denoise": Denoise(DenoiseConfig(min_snr_gamma=gamma), STUDENT, None),
        "variance": Variance(TermConfig(), STUDENT, None),
    }[name]
    return term(StepOutputs(process(), batch, prediction))


@authors
@dtypes
def test_noising(author: str, dtype: torch.dtype) -> None:
    with precision(dtype):
        noised = process().noised(CLEAN.to(dtype), NOISE.to(dtype), TIMESTEPS)
    assert_near(noised, RECORDED[f"{author}/noised"], in_float32=5e-7)


@authors
@dtypes
@pytest.mark.parametrize(
    ("term", "recorded", "in_float32"), [("denoise", "mse", 5e-7), ("variance", "vb", 2e-6)]
)
def test_terms_of_every_timestep(
    author: str, dtype: torch.dtype, term: str, recorded: str, in_float32: float
) -> None:
    """L_simple, with MDT weighed by min-SNR, and L_vlb; two of the timesteps are the first one, with its likelihood."""
    with precision(dtype):
        found = torch.stack([term_of(term, dtype, AUTHORS[author], sample) for sample in SAMPLES])
    assert_near(found, RECORDED[f"{author}/{recorded}"], in_float32)


@authors
@dtypes
def test_the_bound_trains_the_variance_alone(author: str, dtype: torch.dtype) -> None:
    with precision(dtype):
        clean, prediction = CLEAN.to(dtype), PREDICTION.to(dtype, copy=True).requires_grad_()
        noised = process().noised(clean, NOISE.to(dtype), TIMESTEPS)
        variational_bound(process(), prediction, clean, noised, TIMESTEPS).backward()
    mean, variance = prediction.grad.chunk(2, dim=1)
    assert not mean.any() and variance.flatten(1).any(1).all()
    assert_near(prediction.grad, RECORDED[f"{author}/vb_gradient"], in_float32=5e-5)


def test_the_bound_is_finite_whatever_is_predicted() -> None:
    noised = process().noised(CLEAN, NOISE, TIMESTEPS)
    prediction = torch.cat([100 * PREDICTION[:, :3], 3 * PREDICTION[:, 3:]], 1).requires_grad_()
    bound = variational_bound(process(), prediction, CLEAN, noised, TIMESTEPS)
    bound.backward()
    assert bound.isfinite() and prediction.grad.isfinite().all()
