"""Which squeezed map each student head learns, for students whose heads already have a meaning."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, distributed

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.divergence import DivergenceFunction
from shd_diffusion.losses.streaming import Pool, Targets, finer, log_maps


@torch.no_grad()
def assignment_costs(
    targets: Iterable[tuple[slice, Targets]],
    student: AttentionRecord,
    divergence: DivergenceFunction,
    temperature: float,
    pool: Pool,
) -> Tensor:
    """Divergence of every student head from every squeezed map, summed over samples and rows: (N squeezed, N student).

    Summed over all processes too, so that each of them comes to the same assignment.
    """
    costs = student.query.new_zeros((student.heads, student.heads), dtype=torch.float64)
    for group, some in targets:
        ours = student.of_samples(group)
        for part, target in some.chunks():
            log_student = log_maps(ours, finer(part, pool), temperature, pool)
            for head in range(student.heads):
                value, _ = divergence(target[:, head : head + 1].expand_as(log_student), log_student.clone())
                costs[head] += value.sum((0, 2))
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(costs)
    return costs


def best_assignment(costs: Tensor) -> tuple[int, ...]:
    """For each student head the squeezed map that it learns, of least total cost."""
    squeezed, student = linear_sum_assignment(costs.cpu().numpy())
    return tuple(squeezed[student.argsort()].tolist())
