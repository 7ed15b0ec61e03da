"""Means with intervals, paired differences with tests, and Holm's correction for many of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

DRAWN_AT_ONCE = 10**7  # values of bootstrap samples


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over n values with its 95 % interval, which one value alone does not have."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Paired:
    """The mean difference of n pairs, and how likely one so far from 0 is by chance.

    Attributes:
        difference: first minus second.
        t_test: p of the paired t-test, two-sided; None for fewer than two pairs.
        wilcoxon: p of the Wilcoxon signed-rank test, two-sided; for n pairs it is never below 2^(1 - n).
    """

    difference: Estimate
    t_test: float | None
    wilcoxon: float | None


def estimate(values: Sequence[float] | NDArray[np.float64], confidence: float = 0.95) -> Estimate:
    """Mean and interval by Student's t."""
    array = np.asarray(values, dtype=np.float64)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return Estimate(mean, None, None, n)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * array.std(ddof=1) / math.sqrt(n)
    return Estimate(mean, float(mean - half), float(mean + half), n)


def bootstrap(
    values: Sequence[float] | NDArray[np.float64], seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """Mean and percentile interval of the bootstrap (Efron 1979), which takes values for no normal ones; seeded."""
    array = np.asarray(values, dtype=np.float64)
    mean, n = float(array.mean()), len(array)
    if n < 2:
        return Estimate(mean, None, None, n)
    interval = stats.bootstrap(
        (array,),
        np.mean,
        confidence_level=confidence,
        method="percentile",
        batch=max(1, DRAWN_AT_ONCE // n),
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), n)


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compare values that belong together pair by pair."""
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if len(differences) < 2:
        return Paired(estimate(differences), None, None)
    if not differences.any():  # the tests have no statistic then
        return Paired(estimate(differences), 1.0, 1.0)
    t_test = 0.0 if np.ptp(differences) == 0 else float(stats.ttest_rel(first, second).pvalue)
    return Paired(estimate(differences), t_test, float(stats.wilcoxon(differences).pvalue))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (1979) over those p-values that there are, in the order given."""
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[index] = largest
    return corrected
