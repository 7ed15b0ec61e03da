"""Guidance as MDTv2 samples. Parity with the authors' code is in tests/models/test_convert.py."""

from __future__ import annotations

import math

import torch

from shd_diffusion.sampling.guidance import guide, power_cosine_scale


def test_power_cosine_scale_is_the_formula() -> None:
    timesteps = torch.tensor([0, 1, 250, 501, 999])
    for power in (0.01, 1.0, 4.0):
        expected = [
            1 + 2.8 * (1 - math.cos(math.pi * (1 - step / 1000) ** power)) / 2 for step in timesteps.tolist()
        ]
        scale = power_cosine_scale(timesteps, 3.8, power)
        assert torch.allclose(scale, torch.tensor(expected), atol=1e-5)


def test_power_cosine_scale_runs_from_one_to_the_full_scale() -> None:
    scale = power_cosine_scale(torch.arange(51), 4.0, num_train_timesteps=50)
    assert scale[-1] == 1 and scale[0] == 4
    assert (scale.diff() <= 0).all()


def test_guide_by_sample_and_on_the_first_channels() -> None:
    conditional, unconditional = torch.randn(2, 2, 8, 4, 4, dtype=torch.float64)
    scale = torch.tensor([1.0, 3.0])
    guided = guide(conditional, unconditional, scale, channels=3)
    assert torch.allclose(guided[0], conditional[0], atol=1e-6)
    assert torch.equal(guided[:, 3:], conditional[:, 3:])
    expected = 3 * conditional[1, :3] - 2 * unconditional[1, :3]
    assert torch.allclose(guided[1, :3], expected, atol=1e-5)
    everywhere = guide(conditional, unconditional, 3.0)
    assert torch.allclose(everywhere, 3 * conditional - 2 * unconditional, atol=1e-5)
