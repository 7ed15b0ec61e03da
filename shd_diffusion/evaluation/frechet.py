"""Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, arXiv 1706.08500)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from scipy.linalg import lapack
from torch import Tensor

ROWS = 2**16  # at once


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and unbiased covariance (D, D) of a set of features, in float64."""

    mean: Tensor
    covariance: Tensor

    def to(self, device: torch.device) -> Statistics:
        """The same on a device."""
        return Statistics(self.mean.to(device), self.covariance.to(device))

    @cached_property
    def root(self) -> Tensor:
        """Factor R (D, rank) of the covariance, R Rᵀ = Σ; kept, as one reference meets many sets of samples.

        By LAPACK's Cholesky factorisation with complete pivoting, which ends where what is left is rounding: a
        fraction of the time that eigenvectors take, and the less the lower the rank.
        """
        factor, pivots, rank, _ = lapack.dpstrf(self.covariance.cpu().numpy(), lower=1)
        root = torch.empty(len(factor), rank, dtype=torch.float64)
        root[pivots - 1] = torch.from_numpy(factor).tril()[:, :rank]
        return root.to(self.covariance.device)


def feature_statistics(features: Tensor) -> Statistics:
    """Statistics of features (N, D) of any floating type.

    Raises:
        ValueError: fewer than 2 samples, which have no covariance.
    """
    _check_count(len(features))
    mean = features.mean(dim=0, dtype=torch.float64)
    products = features.new_zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for part in features.split(ROWS):  # all of them in float64 may be twice as large as the memory
        centred = part.double() - mean
        products.addmm_(centred.T, centred)
    return Statistics(mean, products / (len(features) - 1))


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f"a covariance needs 2 samples or more, not {count}")


@dataclass(frozen=True)
class Sums:
    """What statistics follow from, added up over parts of a set: all in float64, and of different parts summed."""

    count: Tensor
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Sums:
        """Of features (N, D): N, the sum (D,), and the sum of x xᵀ (D, D)."""
        exact = features.double()
        return cls(torch.tensor(len(exact), device=exact.device), exact.sum(dim=0), exact.T @ exact)

    def statistics(self) -> Statistics:
        """Those of `feature_statistics` but for rounding, by Σ (x - μ)(x - μ)ᵀ = Σ x xᵀ - N μ μᵀ.

        Raises:
            ValueError: fewer than 2 samples, which have no covariance.
        """
        _check_count(int(self.count))
        mean = self.total / self.count
        return Statistics(mean, (self.products - torch.outer(self.total, mean)) / (self.count - 1))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½), symmetric and never below 0 but for rounding.

    The trace of the root is the sum of the roots of the eigenvalues of Σ₁ Σ₂. Those roots are the singular
    values of R₁ᵀ R₂, which keep their digits where Σ₁ Σ₂ is singular, as it is with fewer samples than
    features.

    Raises:
        ValueError: the two sets have features of different width.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of different width: {len(first.mean)} and {len(second.mean)}")
    means = (first.mean - second.mean).square().sum()
    cross = torch.linalg.svdvals(first.root.T @ second.root).sum()
    return (means + first.covariance.trace() + second.covariance.trace() - 2 * cross).item()
