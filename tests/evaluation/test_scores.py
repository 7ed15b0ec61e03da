"""Inception Score, KID and CMMD against their definitions, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shd_diffusion.evaluation import cmmd as cmmd_module
from shd_diffusion.evaluation.cmmd import cmmd
from shd_diffusion.evaluation.inception_score import inception_score
from shd_diffusion.evaluation.kid import kernel_distance, subset_size
from shd_diffusion.evaluation.label_accuracy import LABEL_ACCURACY
from shd_diffusion.evaluation.metric import MetricInputs


def test_inception_score_of_one_split_is_its_definition():
    logits = 3 * torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    exponents = np.exp(logits.double().numpy())
    given = exponents / exponents.sum(axis=1, keepdims=True)
    overall = given.mean(axis=0)
    expected = np.exp(
        np.mean([sum(p * np.log(p / q) for p, q in zip(row, overall, strict=True)) for row in given])
    )
    assert inception_score(logits, splits=1) == (pytest.approx(expected, rel=1e-12), 0.0)


def test_inception_score_at_its_limits():
    certain = 100 * torch.eye(10).repeat(20, 1)
    assert inception_score(certain, splits=1)[0] == pytest.approx(10)
    assert inception_score(torch.zeros(200, 10)) == (pytest.approx(1), pytest.approx(0))
    with pytest.raises(ValueError, match="9 images are too few for 10 splits"):
        inception_score(torch.zeros(9, 10))


def test_kid_of_whole_sets_is_the_unbiased_estimate():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(30, 8, generator=generator), torch.rand(30, 8, generator=generator) + 0.2

    def kernel(x, y):
        return (float(x.double() @ y.double()) / 8 + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (first, second) for i in range(30) for j in range(30) if i != j)
    across = sum(kernel(x, y) for x in first for y in second)
    expected = within / (30 * 29) - 2 * across / 30**2
    assert kernel_distance(first, second, size=30) == (
        pytest.approx(expected, rel=1e-5),
        pytest.approx(0, abs=1e-6),
    )


@pytest.mark.parametrize(
    ("counts", "expected"), [((50_000, 10_000), 1000), ((1000, 1797), 500), ((24, 1797), 12), ((3, 9), 2)]
)
def test_subsets_adapt_to_few_samples(counts: tuple[int, int], expected: int):
    assert subset_size(*counts) == expected


def test_cmmd_is_its_definition(monkeypatch):
    """Equation 4 of the paper on pairs of unit vectors, in float64, with σ = 10 and 1,000 as its scale."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((37, 16)), rng.standard_normal((23, 16)) + 0.5

    def kernel(xs, ys):
        units = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (xs, ys)]
        return np.mean([[np.exp(-np.sum((x - y) ** 2) / (2 * 10**2)) for y in units[1]] for x in units[0]])

    expected = 1000 * (kernel(first, first) + kernel(second, second) - 2 * kernel(first, second))
    sides = torch.from_numpy(first), torch.from_numpy(second)
    # The three means are about 1, so that their rounding is some 1e-16 of the scale.
    assert expected > 0.1 and cmmd(*sides) == pytest.approx(expected, abs=1e-10)
    assert cmmd(3 * sides[0], sides[1] / 7) == pytest.approx(expected, abs=1e-10)  # lengths do not count
    assert cmmd(sides[0], sides[0]) == pytest.approx(0, abs=1e-10)
    monkeypatch.setattr(cmmd_module, "BLOCK", 5)
    assert cmmd(*sides) == pytest.approx(expected, abs=1e-10)


def test_own_classes_among_an_extractors_logits():
    """Logits 1 and 0 are classes 0 and 1: the same accuracy as of the labels exchanged among two logits."""
    logits = torch.tensor([[0.0, 3.0, 9.0], [2.0, 1.0, 9.0], [1.0, 2.0, 9.0]])
    labels = torch.tensor([0, 1, 1])
    inputs = MetricInputs({"features": logits, "logits": logits}, labels, {}, None, None, classes=[1, 0])
    assert LABEL_ACCURACY.entries(inputs)["label_accuracy"] == 2 / 3
