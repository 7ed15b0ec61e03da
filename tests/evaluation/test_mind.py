"""MIND against optimal transport found by assignment, exact values, and torch-fidelity's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from shd_diffusion.evaluation import mind as mind_module
from shd_diffusion.evaluation.mind import mind

ADM = Path(__file__).with_name("adm.safetensors")


def test_is_the_mean_cost_of_optimal_transport_along_lines():
    """The transport along each line found by the Hungarian algorithm, in float64."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(31, 6, generator=generator)
    second = 2 * torch.randn(31, 6, generator=generator) + 0.5
    lines = torch.randn(7, 6, generator=torch.Generator().manual_seed(3)).double().numpy()
    costs = []
    for line in lines / np.linalg.norm(lines, axis=1, keepdims=True):
        cost = ((first.double().numpy() @ line)[:, None] - second.double().numpy() @ line) ** 2
        costs.append(cost[linear_sum_assignment(cost)].mean())
    assert mind(first, second, directions=7, seed=3) == pytest.approx(3 * 6 * np.mean(costs), rel=1e-6)


def test_of_a_set_to_itself_to_its_translation_and_to_its_double(monkeypatch):
    features = torch.randn(40, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert mind(features, features.flip(0)) == 0
    assert mind(features, features + 0.5) == pytest.approx(3 * 0.25, rel=1e-12)  # one dimension has one line
    assert mind(features, 2 * features) == pytest.approx(3 * features.square().mean().item(), rel=1e-12)
    wide = torch.randn(40, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shift = torch.arange(8) / 8
    expected = 3 * shift.square().sum().item()  # over all lines; 10,000 of them come near
    assert mind(wide, wide + shift, directions=10_000) == pytest.approx(expected, rel=0.05)
    whole = mind(wide, 2 * wide)
    monkeypatch.setattr(mind_module, "BLOCK", 7)
    assert mind(wide, 2 * wide) == pytest.approx(whole, rel=1e-12)


def test_is_the_number_of_torch_fidelity():
    """Recorded from its commit 5e211a9, which computes in float32: 300 features against 400, and the other way."""
    recorded = load_file(ADM)
    sides = recorded["generated"].float(), recorded["reference"].float()
    assert mind(*sides) == pytest.approx(1.6234327554702759, rel=1e-6)
    assert mind(*reversed(sides)) == pytest.approx(1.6234327554702759, rel=1e-6)


def test_features_of_different_width_have_none():
    with pytest.raises(ValueError, match="different width: 4 and 5"):
        mind(torch.rand(9, 4), torch.rand(9, 5))
