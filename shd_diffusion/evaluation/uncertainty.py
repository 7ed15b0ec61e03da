"""How far a figure can be trusted: an interval by bootstrap, and the FID of infinitely many samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from shd_diffusion.evaluation.fid import Statistics, feature_statistics, frechet_distance


def bootstrap_interval(
    figure: Callable[[Tensor], float], samples: Tensor, replicates: int, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval that holds the figure's expectation over sets of as many samples, by bootstrap.

    Resampled sets repeat samples, and so have a Fréchet distance that is larger throughout: the quantiles are
    taken of the deviations from the replicates' mean and laid round the figure itself. The interval is of
    chance in the samples; a bias from their number is left as it is (see `fid_infinity`).

    Args:
        figure: of features or logits (N, D).
        samples: (N, D).
        replicates: sets drawn with replacement.
        level: share of such intervals that are to hold it.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(samples), (len(samples),), generator=generator) for _ in range(replicates))
    values = np.array([figure(samples[draw]) for draw in draws])
    low, high = np.quantile(values - values.mean(), [(1 - level) / 2, (1 + level) / 2])
    centre = figure(samples)
    return float(centre + low), float(centre + high)


def fid_infinity(generated: Tensor, reference: Statistics, points: int = 15, seed: int = 0) -> float:
    """Fréchet distance extrapolated to infinitely many samples (Chong and Forsyth 2020, arXiv 1911.07023).

    Its bias falls as 1/N: the distance is computed for `points` random subsets of a fifth to all of the
    samples (N, D) and a line through them, over 1/N, is followed to 0. A bias of the reference's own stays.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = np.linspace(max(2, len(generated) // 5), len(generated), points).astype(int)
    distances = [
        frechet_distance(
            feature_statistics(generated[torch.randperm(len(generated), generator=generator)[:size]]),
            reference,
        )
        for size in sizes
    ]
    _, intercept = np.polyfit(1 / sizes, distances, deg=1)
    return float(intercept)
