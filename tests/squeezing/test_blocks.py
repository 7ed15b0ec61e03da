from itertools import combinations

import numpy as np
import pytest

from shd_diffusion.squeezing.blocks import blocks_to_remove


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all_choices(seed):
    random = np.random.default_rng(seed)
    names = [f"blocks.{index}" for index in range(9)]
    importance = dict(zip(names, random.exponential(size=9), strict=True))
    costs = dict(zip(names, random.integers(1, 20, size=9).astype(float), strict=True))
    budget = random.uniform(0.2, 0.9) * sum(costs.values())
    removed = blocks_to_remove(importance, costs, budget)
    affordable = [
        gone
        for count in range(10)
        for gone in combinations(names, count)
        if sum(costs[name] for name in names if name not in gone) <= budget
    ]
    best = min(sum(importance[name] for name in gone) for gone in affordable)
    assert tuple(removed) in affordable
    assert sum(importance[name] for name in removed) == pytest.approx(best, rel=1e-6)


def test_blocks_of_equal_cost_leave_by_importance_neighbours_too():
    importance = {"a": 3.0, "b": 0.1, "c": 0.2, "d": 5.0}
    assert blocks_to_remove(importance, dict.fromkeys(importance, 1.0), 2) == ["b", "c"]
    assert blocks_to_remove(importance, dict.fromkeys(importance, 1.0), 4) == []
    assert blocks_to_remove(importance, dict.fromkeys(importance, 1.0), 0) == ["a", "b", "c", "d"]


def test_a_negative_budget_cannot_be_met():
    with pytest.raises(ValueError, match="budget of -1"):
        blocks_to_remove({"a": 1.0}, {"a": 1.0}, -1)
