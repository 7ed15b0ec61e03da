"""Extrapolation and classes, on Gaussians whose distances are known."""

from __future__ import annotations

import pytest
import torch

from shd_diffusion.evaluation.fid_infinity import fid_infinity
from shd_diffusion.evaluation.frechet import Statistics, feature_statistics, frechet_distance
from shd_diffusion.evaluation.per_class import per_class_distance

WIDTH = 12
TRUTH = Statistics(torch.zeros(WIDTH, dtype=torch.float64), torch.eye(WIDTH, dtype=torch.float64))


def gaussian(count: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    return (
        torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean
    )


def test_fid_infinity_takes_the_bias_of_few_samples_away():
    errors = []
    for seed in range(5):
        features = gaussian(400, seed, mean=0.2)
        true = WIDTH * 0.2**2
        plain = frechet_distance(feature_statistics(features), TRUTH)
        errors.append((plain - true, fid_infinity(features, TRUTH) - true))
    plain_error, extrapolated_error = torch.tensor(errors).mean(dim=0).abs().tolist()
    assert extrapolated_error < 0.5 * plain_error


def test_each_class_on_its_own():
    features = torch.cat([gaussian(200, 0), gaussian(200, 1, mean=1.0), gaussian(1, 2)])
    labels = torch.tensor([0] * 200 + [1] * 200 + [2])
    real, real_labels = gaussian(600, 3), torch.tensor([0, 1, 2] * 200)
    distances = per_class_distance(features, labels, real, real_labels)
    assert distances.keys() == {0, 1}  # one sample of class 2 has no covariance
    expected = frechet_distance(
        feature_statistics(features[200:400]), feature_statistics(real[real_labels == 1])
    )
    assert distances[1] == pytest.approx(expected)
    assert distances[0] < 2 < WIDTH - 2 < distances[1]
