"""Entropic optimal transport: between the samples of two batches, and between attention maps over a grid of keys.

Source: Cuturi, "Sinkhorn Distances" (NeurIPS 2013); between distributions p and q over the same places the debiased
divergence of Feydy et al. (AISTATS 2019, eq. 3), W(p, q) - (W(p, p) + W(q, q)) / 2, which unlike W is 0 at p = q,
with W(p, q) = max over f, g of <f, p> + <g, q>, f_i = -ε log Σ_j q_j exp((g_j - C_ij) / ε) and g likewise (eq. 9).
Cui et al., "SinKD" (arXiv 2402.17110), take such a distance between the logits of a batch; a map is a distribution
over places that have a distance of their own: C_ij is the squared distance of two tokens on the grid, whose sides are
1. So attention that lands beside its target costs little, where a KL sees no difference between near and far.

Potentials are found in the log domain by a few of Sinkhorn's steps, each a product with the matrix exp(-C / ε); its
smallest entry at ε = 0.1 is exp(-20). The gradient by q is the potential (Feydy et al., section 3), which holds where
the steps have converged.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from shd_diffusion.attention.records import Kind

EPSILON = 0.1
STEPS = 20


def sinkhorn(target: Tensor, log_student: Tensor) -> tuple[Tensor, Tensor]:
    """The debiased Sinkhorn divergence of each row, and its gradient by the student's logits; see `divergence`.

    The keys are a square grid, see `check_grid`.
    """
    student = log_student.exp()
    kernel = grid_kernel(target.shape[-1], target)
    log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log()
    own, of_target = _symmetric(log_student, kernel), _symmetric(log_target, kernel)
    f = of_target
    for _ in range(STEPS):
        g = _softmin(log_target, f, kernel)
        f = _softmin(log_student, g, kernel)
    slope = g - own
    value = torch.linalg.vecdot(f - of_target, target) + torch.linalg.vecdot(slope, student)
    return value, student.mul_(slope - torch.linalg.vecdot(student, slope)[..., None])


def _symmetric(log_weights: Tensor, kernel: Tensor) -> Tensor:
    """The potential f = g of W(p, p), by averaged steps, which converge at once."""
    f = torch.zeros_like(log_weights)
    for _ in range(STEPS // 2):
        f = (f + _softmin(log_weights, f, kernel)) / 2
    return f


def _softmin(log_weights: Tensor, potential: Tensor, kernel: Tensor) -> Tensor:
    """-ε log Σ_j w_j exp((f_j - C_ij) / ε), (..., K)."""
    logits = log_weights + potential / EPSILON
    largest = logits.amax(-1, keepdim=True)
    sums = ((logits - largest).exp() @ kernel).clamp_min(torch.finfo(kernel.dtype).tiny)
    return (sums.log() + largest) * -EPSILON


def grid_kernel(keys: int, like: Tensor) -> Tensor:
    """exp(-C / ε) of a square grid of keys, (K, K)."""
    side = isqrt(keys)
    place = torch.arange(side, dtype=like.dtype, device=like.device) / max(side - 1, 1)
    along = (place[:, None] - place).square()
    cost = along[:, None, :, None] + along[None, :, None, :]
    return torch.exp(-cost / EPSILON).view(keys, keys)


def check_grid(keys: int, kind: Kind) -> None:
    """See that a map's keys have places.

    Raises:
        ValueError: they are no square grid of image tokens.
    """
    if kind != "self" or isqrt(keys) ** 2 != keys:
        raise ValueError(
            f"`sinkhorn` measures distances on a square grid of image tokens, and this is {kind}-attention over {keys} "
            "keys; set `kinds: [self]`, or another divergence"
        )


@torch.no_grad()
def transport_plan(cost: Tensor, epsilon: float, steps: int = 50) -> Tensor:
    """The entropic plan between two uniform distributions, (n, m), without a gradient.

    Args:
        cost: (n, m).
        steps: Sinkhorn's, in the log domain; the columns' sums are exact after the last.
    """
    logits = -cost / epsilon
    for _ in range(steps):
        logits = logits.log_softmax(1)
        logits = logits.log_softmax(0)
    return logits.exp() / cost.shape[1]
