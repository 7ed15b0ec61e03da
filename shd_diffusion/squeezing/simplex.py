"""Simplex-constrained least squares, exactly and in a batch."""

from __future__ import annotations

import torch
from torch import Tensor


def minimum_norm_weights(gram: Tensor) -> Tensor:
    """The w on the simplex that minimises `w^T H w`: the point of least norm in the hull of m vectors.

    Wolfe's algorithm ("Finding the nearest point in a polytope", 1976) on the vectors' Gram matrix, every
    problem of the batch advancing one step an iteration. It ends at the exact minimum after finitely many.

    Args:
        gram: H, (..., m, m), symmetric and positive semidefinite.

    Returns:
        w, (..., m), non-negative with sum 1; uniform where H is zero (every w is optimal), NaN where H is not
        finite.
    """
    shape, m = gram.shape[:-1], gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).amax(-1)
    finite = torch.isfinite(gram).all((-2, -1))
    solvable = finite & (scale > 0)
    h = torch.where(solvable[..., None, None], gram / scale[..., None, None], torch.eye(m).to(gram))
    h = h.reshape(-1, m, m).double()
    weights = torch.nn.functional.one_hot(h.diagonal(dim1=-2, dim2=-1).argmin(-1), m).to(h)
    active = weights > 0
    descending = torch.ones(len(h), dtype=torch.bool, device=h.device)  # False: the support is being reduced
    for _ in range(16 * m):
        slope = (h @ weights[..., None])[..., 0]  # half the gradient
        value = (weights * slope).sum(-1)
        steepest = slope.masked_fill(active, torch.inf).min(-1)
        grow = descending & (steepest.values < value - 1e-12)
        if not (grow | ~descending).any():
            break
        active = active | (grow[:, None] & torch.nn.functional.one_hot(steepest.indices, m).bool())
        # Least norm in the affine hull of the active vectors, then as far towards it as the simplex allows.
        goal = _affine_minimum(h, active)
        leaving = active & (goal <= 0)
        step = (
            torch.where(leaving, weights / (weights - goal).clamp_min(1e-300), torch.inf)
            .amin(-1)
            .clamp_max(1)
        )
        moving = (grow | ~descending)[:, None]
        weights = torch.where(moving, weights + step[:, None] * (goal - weights), weights)
        active = torch.where(moving, active & ~(leaving & (weights <= 1e-15)), active)
        weights = torch.where(active, weights, 0.0)
        descending = torch.where(moving[:, 0], ~leaving.any(-1), descending)
    weights = (weights / weights.sum(-1, keepdim=True)).reshape(shape).to(gram.dtype)
    weights = torch.where(solvable[..., None], weights, 1 / m)
    return torch.where(finite[..., None], weights, torch.nan)


def _affine_minimum(h: Tensor, active: Tensor) -> Tensor:
    """Weights with sum 1 on the active vectors (0 elsewhere) that minimise the norm: H_S w ∝ 1."""
    both = active[:, :, None] & active[:, None, :]
    ridge = 1e-14 * torch.eye(h.shape[-1]).to(h)
    system = torch.where(both, h, 0.0) + ridge + torch.diag_embed((~active).to(h))
    solution = torch.linalg.solve(system, active.to(h)[..., None])[..., 0]
    return solution / solution.sum(-1, keepdim=True)
