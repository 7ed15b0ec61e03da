"""The method in its literal form, float64, one sample and one pair at a time: written from docs/method.md alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
Plan = tuple[tuple[tuple[int, ...], ...], ...]


def contributions(values: Tensor, weight: Tensor) -> Array:
    """X_h = V_h W_h, (B, M, K, C)."""
    heads, width = values.shape[1], values.shape[3]
    by_head = weight.double().numpy().T.reshape(heads, width, -1)
    return np.einsum("bmkd,mdc->bmkc", values.double().numpy(), by_head)


def squared_error(alpha: float, p: Array, q: Array, x: Array, y: Array) -> float:
    """|A_p X_p + A_q X_q - (α A_p + (1 - α) A_q)(X_p + X_q)|² as it stands."""
    merged = alpha * p + (1 - alpha) * q
    return float(((p @ x + q @ y - merged @ (x + y)) ** 2).sum())


def best_alpha(p: Array, q: Array, x: Array, y: Array) -> float:
    """Paper, eq. 10, clipped."""
    difference, total = p - q, x + y
    moved = difference @ total
    squared = float((moved**2).sum())
    return 0.5 if squared == 0 else float(np.clip(((difference @ x) * moved).sum() / squared, 0, 1))


def mean_alpha(*_: Array) -> float:
    return 0.5


def select_alpha(p: Array, q: Array, x: Array, y: Array) -> float:
    return 1.0 if squared_error(1, p, q, x, y) < squared_error(0, p, q, x, y) else 0.0


def adjacent_plan(heads: int, target: int) -> Plan:
    plan = []
    while heads > target:
        merges = min(heads // 2, heads - target)
        pairs = [(2 * i, 2 * i + 1) for i in range(merges)]
        plan.append((*pairs, *((h,) for h in range(2 * merges, heads))))
        heads -= merges
    return tuple(plan)


def squeeze(
    maps: Tensor,
    values: Tensor,
    weight: Tensor,
    plan: Plan,
    by_row: bool = False,
    alpha: Callable[[Array, Array, Array, Array], float] = best_alpha,
) -> tuple[Array, Array]:
    """The squeezed maps (B, N, Q, K), and the squared error of each squeezed head (B, N)."""
    x = contributions(values, weight)
    results, errors = [], []
    for sample, of_heads in zip(maps.double().numpy(), x, strict=True):
        heads = [(sample[h], of_heads[h], [h]) for h in range(len(sample))]
        for groups in plan:
            merged = []
            for group in groups:
                a, b, behind = heads[group[0]]
                for other in group[1:]:
                    c, d, more = heads[other]
                    rows = [slice(r, r + 1) for r in range(len(a))] if by_row else [slice(None)]
                    a = np.concatenate([(t := alpha(a[r], c[r], b, d)) * a[r] + (1 - t) * c[r] for r in rows])
                    b, behind = b + d, behind + more
                merged.append((a, b, behind))
            heads = merged
        results.append([a for a, _, _ in heads])
        errors.append([group_error(a, sample, of_heads, behind)[0] for a, _, behind in heads])
    return np.array(results), np.array(errors)


def group_error(merged: Array, maps: Array, x: Array, behind: list[int]) -> tuple[float, float]:
    """|sum A_h X_h - Ā sum X_h|² and |sum A_h X_h|² over a group of heads."""
    output = sum(maps[h] @ x[h] for h in behind)
    lost = output - merged @ sum(x[h] for h in behind)
    return float((lost**2).sum()), float((output**2).sum())


def random_block(
    samples: int,
    heads: int,
    queries: int,
    keys: int,
    width: int,
    channels: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (B, M, Q, K), values (B, M, K, d) and an output weight (C, M·d)."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(samples, heads, queries, keys, generator=generator, dtype=dtype).mul(1.5).softmax(-1)
    values = torch.randn(samples, heads, keys, width, generator=generator, dtype=dtype)
    return maps, values, torch.randn(channels, heads * width, generator=generator, dtype=dtype)
