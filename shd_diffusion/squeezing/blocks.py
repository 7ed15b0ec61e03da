"""Which blocks leave, of a given number (docs/method.md section 8)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp


def blocks_to_remove(importance: Mapping[str, float], costs: Mapping[str, float], budget: float) -> list[str]:
    """The blocks of least total importance whose removal leaves at most `budget` of the cost.

    Importances are taken to add up, as LAPTOP-Diff does (arXiv 2404.11098): a 0-1 knapsack, solved exactly.

    Args:
        importance: of each block, what its removal alone changes of the model's output.
        costs: of each block, positive, in any unit (parameters, multiply-adds, 1 to count blocks).
        budget: what the blocks that stay may cost together.

    Returns:
        Names, in the order of `importance`.

    Raises:
        ValueError: the budget is negative, or an importance is not finite.
    """
    names = list(importance)
    loss, cost = (np.array([of[name] for name in names], dtype=float) for of in (importance, costs))
    if budget < 0 or not np.isfinite(loss).all():
        raise ValueError(
            f"a budget of {budget} cannot be met, or an importance is not finite: {dict(importance)}"
        )
    needed = cost.sum() - budget
    if needed <= 0:
        return []
    # minimise Σ x_b loss_b over x in {0, 1} with Σ x_b cost_b >= needed
    found = milp(
        loss / max(np.abs(loss).max(), np.finfo(float).tiny),
        integrality=np.ones(len(names)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(cost[None] / cost.max(), lb=needed / cost.max() - 1e-9),
    )
    return [name for name, gone in zip(names, found.x, strict=True) if gone > 0.5]
