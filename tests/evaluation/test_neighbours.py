"""Precision, recall, density and coverage against loops over all pairs, and against ADM's code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shd_diffusion.evaluation import precision_recall as precision_recall_module
from shd_diffusion.evaluation.density_coverage import density_coverage
from shd_diffusion.evaluation.precision_recall import precision_recall

ADM = Path(__file__).with_name("adm.safetensors")


@pytest.fixture(scope="module")
def sides() -> tuple[Tensor, Tensor]:
    """40 generated samples, bunched, and 50 real ones."""
    generator = torch.Generator().manual_seed(0)
    return 0.6 * torch.randn(40, 3, generator=generator) + 0.3, torch.randn(50, 3, generator=generator)


def radius(samples: Tensor, index: int, neighbours: int) -> float:
    return sorted(float((samples[index] - other).double().norm()) for other in samples)[neighbours]


def on_manifold(point: Tensor, samples: Tensor, neighbours: int) -> bool:
    return any(
        float((point - samples[i]).double().norm()) <= radius(samples, i, neighbours)
        for i in range(len(samples))
    )


def test_precision_and_recall_are_their_definitions(sides):
    generated, reference = sides
    precision = sum(on_manifold(point, reference, 3) for point in generated) / len(generated)
    recall = sum(on_manifold(point, generated, 3) for point in reference) / len(reference)
    assert precision > recall + 0.1  # so that swapped sides would show
    assert precision_recall(generated, reference) == (pytest.approx(precision), pytest.approx(recall))


def test_density_and_coverage_are_their_definitions(sides):
    generated, reference = sides
    inside = torch.tensor(
        [
            [float((point - centre).norm()) < radius(reference, i, 5) for point in generated]
            for i, centre in enumerate(reference)
        ]
    )
    expected = inside.sum().item() / (5 * len(generated)), inside.any(dim=1).double().mean().item()
    assert density_coverage(generated, reference) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


@pytest.mark.parametrize("metric", [precision_recall, density_coverage])
def test_blocks_do_not_change_the_metrics(metric, sides, monkeypatch):
    whole = metric(*sides)
    monkeypatch.setattr(precision_recall_module, "DISTANCES", 7 * max(map(len, sides)))
    assert precision_recall_module.rows_at_once(*map(len, sides)) == 7
    assert metric(*sides) == whole


def test_equals_the_adm_evaluator_in_float32():
    """No sample is nearer to a rim than 7e-6 of the squared norms, so that no rounding of 2^-24 moves one over it."""
    recorded = load_file(ADM)
    generated, reference = 128 * recorded["generated"], 128 * recorded["reference"]
    expected = pytest.approx(tuple(recorded["overflow"][1:].tolist()), rel=1e-6)
    assert precision_recall(generated, reference) == expected


@pytest.mark.parametrize("metric", [precision_recall, density_coverage])
def test_refuses_sets_without_enough_neighbours(metric):
    with pytest.raises(ValueError, match="neighbours each"):
        metric(torch.rand(3, 4), torch.rand(3, 4))
