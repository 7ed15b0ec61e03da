"""Divergences between a target map and the student's map, with their gradients.

Each function takes the target p and log q, both (..., K) with rows that are distributions, and returns the
divergence of each row and its gradient by the student's logits: with g the derivative by q, the softmax turns
it into q · (g - <q, g>). Formulas replace automatic differentiation so that a chunk of maps is read few times
and nothing of it is kept. Memory traffic is what they cost: `log_student` may be overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from shd_diffusion.losses.sinkhorn import sinkhorn

Divergence = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl", "adaptive_kl", "mse", "sinkhorn"
]
DivergenceFunction: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def safe_log(probabilities: Tensor) -> Tensor:
    """log p with a finite floor, so that p · log p is 0 at p = 0."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log_()


def forward_kl(target: Tensor, log_student: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q); gradient q - p."""
    value = safe_log(target).sub_(log_student).mul_(target).sum(-1)
    return value, log_student.exp_().sub_(target)


def forward_kl_of_logits(target: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same from the student's finite logits s, with one exponential an entry: Σ p (log p - s) + log Σ exp s.

    The last is had where q is largest, as s - log q there.
    """
    student = logits.softmax(-1)
    normaliser = logits.amax(-1).sub_(student.amax(-1).log_())
    value = safe_log(target).sub_(logits).mul_(target).sum(-1).add_(normaliser)
    return value, student.sub_(target)


def reverse_kl(target: Tensor, log_student: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p)."""
    student = log_student.exp()
    ratio = log_student - safe_log(target)
    value = torch.linalg.vecdot(student, ratio)
    return value, student.mul_(ratio.sub_(value[..., None]))


def jensen_shannon(target: Tensor, log_student: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2."""
    student = log_student.exp()
    log_middle = safe_log((target + student) / 2)
    half = (log_student - log_middle) / 2  # derivative by q
    from_student = torch.linalg.vecdot(student, half)
    value = from_student + torch.linalg.vecdot(target, safe_log(target).sub_(log_middle)) / 2
    return value, student.mul_(half.sub_(from_student[..., None]))


def skewed_kl(target: Tensor, log_student: Tensor, skew: float = 0.1) -> tuple[Tensor, Tensor]:
    """KL(p || λp + (1 - λ)q) with λ = 0.1 (DistiLLM, arXiv 2402.03898, eq. 3)."""
    student = log_student.exp()
    middle = torch.lerp(student, target, skew).clamp_min_(torch.finfo(target.dtype).tiny)
    value = torch.linalg.vecdot(target, safe_log(target).sub_(middle.log()))
    slope = middle.reciprocal_().mul_(target).mul_(skew - 1)  # derivative by q
    return value, student.mul_(slope.sub_(torch.linalg.vecdot(student, slope)[..., None]))


def adaptive_kl(target: Tensor, log_student: Tensor, head: float = 0.5) -> tuple[Tensor, Tensor]:
    """Forward and reverse KL, each row weighted by where the maps differ (Wu et al., arXiv 2404.02657).

    The forward KL weighs as much as the gap on the target's largest entries, which together hold `head` of
    the mass, the reverse KL as much as the gap on the rest. The weights are constants to the optimiser.
    """
    student = log_student.exp()
    ordered, order = target.sort(dim=-1, descending=True)
    gap = (ordered - student.gather(-1, order)).abs_()
    in_head = ordered.cumsum(-1) - ordered < head
    largest, rest = (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)
    share = torch.where(largest + rest > 0, largest / (largest + rest).clamp_min(1e-30), 0.5)
    reverse, reverse_gradient = reverse_kl(target, log_student)
    forward, forward_gradient = forward_kl(target, log_student)
    value = share * forward + (1 - share) * reverse
    return value, torch.lerp(reverse_gradient, forward_gradient, share[..., None])


def mse(target: Tensor, log_student: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error over the keys that a mask leaves: the ablation's alternative."""
    keys = (log_student > -1e20).sum(-1, dtype=target.dtype)  # of those that are hidden, log q is far lower
    student = log_student.exp()
    difference = student - target
    value = difference.square().sum(-1) / keys
    slope = difference.mul_(2 / keys[..., None])
    return value, student.mul_(slope.sub_(torch.linalg.vecdot(student, slope)[..., None]))


DIVERGENCES: dict[str, DivergenceFunction] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_kl": skewed_kl,
    "adaptive_kl": adaptive_kl,
    "mse": mse,
    "sinkhorn": sinkhorn,
}
