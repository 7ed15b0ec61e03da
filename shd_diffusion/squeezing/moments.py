"""Least squares from sums over batches: what is kept does not grow with their number, only with the widths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-5
"""λ over the mean of a Gram matrix's diagonal."""

_COLUMNS = 512  # of a Gram matrix that are computed at once


@dataclass(slots=True)
class Moments:
    """Second moments of features Z (T, p) and targets Y (T, C), summed over rows in float64.

    Attributes:
        gram: ZᵀZ, (p, p).
        cross: ZᵀY, (p, C).
        energy: |Y|².
        feature_sum: Σ z, (p,).
        target_sum: Σ y, (C,).
        rows: T.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    feature_sum: Tensor
    target_sum: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, features: int, targets: int, device: torch.device | str = "cpu") -> Moments:
        """Moments of no rows."""

        def sums(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(sums(features, features), sums(features, targets), sums(), sums(features), sums(targets))

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows: Z (T, p) and Y (T, C) of any floating dtype."""
        z, y = features.double(), targets.double()
        for start in range(0, z.shape[1], _COLUMNS):  # its upper half; the lower one is a copy
            here, after = slice(start, start + _COLUMNS), slice(start + _COLUMNS, None)
            self.gram[here, start:].addmm_(z[:, here].T, z[:, start:])
            self.gram[after, here] = self.gram[here, after].T
        self.cross.addmm_(z.T, y)
        self.energy += y.square().sum()
        self.feature_sum += z.sum(0)
        self.target_sum += y.sum(0)
        self.rows += len(z)

    def centred(self) -> Moments:
        """The moments about the means: those of a fit with a free constant beside the features."""
        z, y, rows = self.feature_sum, self.target_sum, max(self.rows, 1)
        return Moments(
            self.gram - torch.outer(z, z) / rows,
            self.cross - torch.outer(z, y) / rows,
            self.energy - y.square().sum() / rows,
            torch.zeros_like(z),
            torch.zeros_like(y),
            self.rows,
        )

    def constant(self, weight: Tensor) -> Tensor:
        """The constant (C,) that goes with weights (p, C) fitted to the centred moments."""
        return (self.target_sum - self.feature_sum @ weight) / max(self.rows, 1)

    def loss(self, weight: Tensor) -> float:
        """|Y - Z W|² = |Y|² - 2 <W, ZᵀY> + <W, ZᵀZ W> for weights W (p, C); at least 0."""
        fitted = self.gram @ weight
        return float((self.energy + (weight * (fitted - 2 * self.cross)).sum()).clamp_min(0))


def share(error: float, energy: float | Tensor) -> float:
    """|error|² / |target|²; 0 where there is nothing to lose, as in a block that puts out nothing."""
    return error / float(energy) if energy > 0 else 0.0


def ridge(gram: Tensor, strength: float) -> float:
    """λ: `strength` times the mean of the Gram matrix's diagonal."""
    return strength * float(gram.diagonal().mean())


def inverse_root(gram: Tensor) -> Tensor:
    """B (p, r) with B Bᵀ the pseudo-inverse of a positive semidefinite matrix (p, p) of rank r."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1].clamp_min(0) * len(gram) * torch.finfo(gram.dtype).eps
    return vectors[:, kept] * values[kept].rsqrt()


def solve(gram: Tensor, cross: Tensor) -> Tensor:
    """The least-norm W (p, C) with gram W = cross, for a positive semidefinite Gram matrix (p, p)."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    smallest = factor.diagonal().min() ** 2
    if failed == 0 and smallest > gram.diagonal().max() * len(gram) * torch.finfo(gram.dtype).eps:
        return torch.cholesky_solve(cross, factor)
    root = inverse_root(gram)
    return root @ (root.T @ cross)
