"""The Fréchet distance against SciPy's matrix root, exact values for singular covariances, and ADM's code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file
from torch import Tensor

from shd_diffusion.evaluation.frechet import feature_statistics, frechet_distance

ADM = Path(__file__).with_name("adm.safetensors")


def correlated(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + 0.1 * seed


def distance(first: Tensor, second: Tensor) -> float:
    return frechet_distance(feature_statistics(first), feature_statistics(second))


def test_equals_the_matrix_root():
    first, second = correlated(500, 24, 1), correlated(700, 24, 2)
    means = first.mean(0) - second.mean(0)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = float(means @ means) + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert distance(first, second) == pytest.approx(expected, rel=1e-10)
    assert distance(first, second) == pytest.approx(distance(second, first), rel=1e-12)


def test_fewer_samples_than_features():
    """Then the trace of the root is the nuclear norm of the centred samples' products."""
    first, second = correlated(20, 100, 1), correlated(30, 100, 2)
    centred = (first - first.mean(0)) / 19**0.5, (second - second.mean(0)) / 29**0.5
    cross = torch.linalg.matrix_norm(centred[0] @ centred[1].T, ord="nuc")
    means = (first.mean(0) - second.mean(0)).square().sum()
    expected = means + centred[0].square().sum() + centred[1].square().sum() - 2 * cross
    assert distance(first, second) == pytest.approx(expected.item(), rel=1e-10)


def test_of_a_set_to_itself_and_to_its_translation():
    features = correlated(300, 16, 3)
    assert distance(features, features) == pytest.approx(0, abs=1e-9)
    assert distance(features, features + 0.5) == pytest.approx(16 * 0.25, rel=1e-9)


def test_one_feature_is_the_textbook_formula():
    first, second = correlated(50, 1, 1), 3 * correlated(60, 1, 2)
    expected = (first.mean() - second.mean()) ** 2 + (first.std() - second.std()) ** 2
    assert distance(first, second) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(("case", "scale"), [("half", 1), ("overflow", 128)])
def test_equals_the_adm_evaluator(case: str, scale: int):
    recorded = load_file(ADM)
    ours = distance(scale * recorded["generated"], scale * recorded["reference"])
    assert ours == pytest.approx(recorded[case][0].item(), rel=1e-6)


def test_refuses_what_has_no_distance():
    with pytest.raises(ValueError, match="2 samples or more, not 1"):
        feature_statistics(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="different width: 4 and 5"):
        distance(torch.rand(9, 4), torch.rand(9, 5))
