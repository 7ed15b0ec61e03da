"""Heads that share keys and values, against all choices that leave heads of the same kind."""

from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from shd_diffusion.squeezing.matching import merge_rounds, round_of
from shd_diffusion.squeezing.plan import check_plan, members
from shd_diffusion.squeezing.shared_keys import (
    cells_of,
    key_value_counts,
    plan_sharing,
    select_sharing,
    sharing_pairs,
)

MHA = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 6}


def test_the_numbers_of_heads_are_products_of_fewer_keys_and_fewer_heads_each():
    assert key_value_counts(4, 1) == {1: 1, 2: 1, 3: 1, 4: 1}
    assert key_value_counts(6, 6) == MHA
    assert key_value_counts(6, 3) == {1: 1, 2: 2, 3: 3, 4: 2, 6: 3}
    found = key_value_counts(24, 8)  # Lumina2's
    assert list(found) == [*range(1, 11), 12, 14, 15, 16, 18, 21, 24]
    assert (found[16], found[12], found[8], found[9]) == (8, 6, 8, 3)


def random_losses(heads: int, seed: int) -> dict[tuple[int, ...], float]:
    values = np.random.default_rng(seed).exponential(size=heads * heads)
    return {pair: float(values[pair[0] * heads + pair[1]]) for pair in combinations(range(heads), 2)}


@pytest.mark.parametrize("seed", range(4))
def test_keys_that_merge_are_the_best_with_the_best_pairs_of_their_heads(seed):
    """6 heads on 3 keys to 4 on 2: one pair of keys merges, each head of one with a head of the other."""
    losses = random_losses(6, seed)
    behind = tuple((head,) for head in range(6))
    cells = [(0, 1), (2, 3), (4, 5)]
    choices = [
        sorted(zip(first, order, strict=True))
        for first, second in combinations(cells, 2)
        for order in permutations(second)
    ]
    best = min(choices, key=lambda pairs: sum(losses[pair] for pair in pairs))
    assert sorted(sharing_pairs(2, 4, 2)(behind, losses)) == best


@pytest.mark.parametrize("seed", range(4))
def test_heads_that_share_a_key_merge_at_least_loss_in_each_key(seed):
    """8 heads on 2 keys to 4 on 2: two pairs in each."""
    losses = random_losses(8, seed)
    found = sharing_pairs(4, 4, 2)(tuple((head,) for head in range(8)), losses)
    for cell in ((0, 1, 2, 3), (4, 5, 6, 7)):
        a, b, c, d = cell
        choices = [[(a, b), (c, d)], [(a, c), (b, d)], [(a, d), (b, c)]]
        best = min(choices, key=lambda pairs: sum(losses[pair] for pair in pairs))
        assert sorted(pair for pair in found if pair[0] in cell) == best


@pytest.mark.parametrize("target", sorted(key_value_counts(24, 8)))
def test_every_plan_ends_with_as_many_heads_on_each_key(target):
    key_values = key_value_counts(24, 8)[target]
    plan = plan_sharing(24, 3, target, key_values)
    check_plan(plan, 24, target)
    cells = cells_of(members(plan, 24), 3)
    assert [len(cell) for cell in cells.values()] == [target // key_values] * key_values


def test_neighbours_merge_and_the_rounds_are_those_of_any_plan():
    assert plan_sharing(6, 2, 4, 2) == (((0, 2), (1, 3), (4,), (5,)),)
    assert plan_sharing(6, 2, 2, 2) == (((0, 2), (1, 3), (4,), (5,)), ((0, 1), (2, 3)))
    assert round_of([(1, 3)], 5) == ((0,), (1, 3), (2,), (4,))


def test_on_maps_the_doubles_merge():
    """Two keys with the same maps are one."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 6, 5, 5, generator=generator).mul(2).softmax(-1)
    maps[:, 5], maps[:, 4] = maps[:, 0], maps[:, 1]
    values = torch.randn(2, 6, 5, 3, generator=generator)

    class Maps:
        shape = maps.shape

        def walk(self):
            yield (slice(None), slice(None)), maps

    weight = torch.randn(4, 18, generator=generator)
    plan = merge_rounds([(Maps(), values)], weight, 4, sharing_pairs(2, 4, 2))
    assert members(plan, 6) == ((0, 5), (1, 4), (2,), (3,))


def test_of_merged_keys_the_one_whose_heads_move_most_stays_with_the_heads_that_do():
    movements = torch.tensor([1.0, 5.0, 2.0, 3.0, 9.0, 0.1])
    groups = ((0, 3), (4,), (1, 2), (5,))  # keys 0 and 1 are one
    assert select_sharing(groups, movements, 2) == (((0, 3), (1, 2), (4,), (5,)), (0, 1, 4, 5))
    more = ((0, 1, 2, 3),)
    assert select_sharing(more, movements[:4], 2) == (more, (1,))
