"""The Fréchet distance of infinitely many samples, without the bias of few."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shd_diffusion.evaluation.frechet import Statistics, feature_statistics, frechet_distance
from shd_diffusion.evaluation.metric import Column, Metric, Need


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


FID_INFINITY = Metric(
    "fid-infinity",
    lambda inputs: fid_infinity(inputs.features, inputs.statistics["features"]),
    (Column("fid_infinity", "FID∞", "FID∞", "lower", ".2f"),),
    needs=(Need.REFERENCE,),
)
