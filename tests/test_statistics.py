"""Intervals, tests and Holm's correction against numbers worked out by hand or from tables."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from shd_diffusion.statistics import Estimate, bootstrap, estimate, holm, paired


def test_the_interval_is_students() -> None:
    """t for 97.5 % and 4 degrees of freedom is 2.776 in every table; the deviation here is sqrt(2.5)."""
    found = estimate([1, 2, 3, 4, 5])
    half = 2.776445 * math.sqrt(2.5 / 5)
    assert (found.mean, found.n) == (3.0, 5)
    assert found.low == pytest.approx(3 - half, rel=1e-6) and found.high == pytest.approx(3 + half, rel=1e-6)


def test_one_value_has_no_interval() -> None:
    assert estimate([4.0]).low is None and paired([4.0], [1.0]).t_test is None
    assert paired([4.0], [1.0]).difference.mean == 3.0


def test_the_t_test_by_its_integral() -> None:
    """p is the area of Student's density (3 degrees of freedom) beyond the statistic, both sides."""
    first, second = [5.0, 7.0, 4.0, 9.0], [4.0, 5.5, 4.5, 6.0]
    differences = np.subtract(first, second)
    statistic = differences.mean() / (differences.std(ddof=1) / 2)
    x = np.linspace(-statistic, statistic, 200_001)
    density = 2 / (math.pi * math.sqrt(3)) * (1 + x**2 / 3) ** -2
    assert paired(first, second).t_test == pytest.approx(1 - np.trapezoid(density, x), abs=1e-8)


def test_wilcoxon_by_all_signs() -> None:
    """Exact: of all 2^5 ways to sign the ranks, those whose sum of positive ranks is as far from the middle."""
    differences = np.array([0.3, -0.1, 0.7, 0.9, 1.4])
    ranks = np.abs(differences).argsort().argsort() + 1
    observed = ranks[differences > 0].sum()
    sums = [np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=5)]
    extreme = np.mean([abs(total - 7.5) >= abs(observed - 7.5) for total in sums])
    assert paired(differences, np.zeros(5)).wilcoxon == pytest.approx(extreme)
    assert paired(np.abs(differences), np.zeros(5)).wilcoxon == pytest.approx(2**-4)


def test_equal_pairs_differ_by_nothing() -> None:
    same = paired([1.0, 2.0], [1.0, 2.0])
    assert (same.difference.mean, same.t_test, same.wilcoxon) == (0.0, 1.0, 1.0)


def test_holm() -> None:
    """Holm 1979: ascending p times 4, 3, 2, 1, never below the one before, never above 1."""
    corrected = holm([0.01, 0.04, 0.03, 0.005])
    assert corrected == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.7]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_the_bootstrap_of_two_values_by_counting() -> None:
    """A quarter of all resamples each is 0 0 and 1 1, so that the outer 2.5 % are 0 and 1."""
    assert bootstrap([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0, 2)
    assert bootstrap([3.0]) == Estimate(3.0, None, None, 1)
    assert bootstrap([2.0, 2.0, 2.0]) == Estimate(2.0, 2.0, 2.0, 3)


def test_the_bootstrap_of_many_normal_values_is_nearly_students_and_seeded() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    found, expected = bootstrap(values, seed=1), estimate(values)
    assert found.mean == pytest.approx(expected.mean)
    # the standard deviation of 400 values is known to 4 %, a quantile of 9,999 resamples to 2 %
    assert found.high - found.low == pytest.approx(expected.high - expected.low, rel=0.08)
    assert bootstrap(values, seed=1) == found != bootstrap(values, seed=2)
