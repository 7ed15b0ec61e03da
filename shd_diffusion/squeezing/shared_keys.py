"""Heads that share keys and values (grouped-query attention): how many there can be, and which of them merge.

Each of G key/value heads serves r = M / G neighbouring heads. What is left must be of the same kind: G' keys and values
that serve r' heads each. So whole key/value heads merge first, head by head, then heads that share one.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from shd_diffusion.squeezing.matching import Choice, minimum_matching, round_of
from shd_diffusion.squeezing.plan import Group, Plan, Round, members, num_merges


def key_value_counts(heads: int, key_value_heads: int) -> dict[int, int]:
    """The numbers N = G'·r' of heads that M = G·r can become, with the most key/value heads G' that allow each."""
    sharing = heads // key_value_heads
    pairs = ((kept * each, kept) for kept in range(1, key_value_heads + 1) for each in range(1, sharing + 1))
    return dict(sorted(pairs))  # of equal N the last pair stays, that of the largest G'


def sharing_pairs(sharing: int, target: int, target_key_values: int) -> Choice:
    """The pairs of a round of least total loss among those that leave heads of the same kind.

    Args:
        sharing: r.
        target: N.
        target_key_values: G'.
    """

    def choice(behind: Round, losses: Mapping[Group, float]) -> list[Group]:
        cells = list(cells_of(behind, sharing).values())
        if len(cells) > target_key_values:
            assigned: dict[Group, list[Group]] = {
                (a, b): _assigned(losses, cells[a], cells[b]) for a, b in combinations(range(len(cells)), 2)
            }
            costs = {pair: sum(losses[merge] for merge in merges) for pair, merges in assigned.items()}
            pairs = minimum_matching(costs, len(cells), num_merges(len(cells), target_key_values))
            return [merge for pair in pairs for merge in assigned[pair]]
        merges: list[Group] = []
        count = num_merges(len(cells[0]), target // target_key_values)
        for cell in cells:
            own: dict[Group, float] = {
                (i, j): losses[cell[i], cell[j]] for i, j in combinations(range(len(cell)), 2)
            }
            merges += [(cell[i], cell[j]) for i, j in minimum_matching(own, len(cell), count)]
        return merges

    return choice


def plan_sharing(heads: int, sharing: int, target: int, target_key_values: int) -> Plan:
    """The plan in which neighbours merge, as far as they leave heads of the same kind."""
    choice = sharing_pairs(sharing, target, target_key_values)
    behind: Round = tuple((head,) for head in range(heads))
    plan: list[Round] = []
    while len(behind) > target:
        distances: dict[Group, float] = {
            (i, j): float(j - i) ** 2 for i, j in combinations(range(len(behind)), 2)
        }
        plan.append(round_of(choice(behind, distances), len(behind)))
        behind = members(tuple(plan), heads)
    return tuple(plan)


def cells_of(heads: Round, sharing: int) -> dict[frozenset[int], list[int]]:
    """The heads of a round that share a key and a value, by the teacher's key/value heads behind these."""
    cells: dict[frozenset[int], list[int]] = {}
    for index, group in enumerate(heads):
        cells.setdefault(frozenset(head // sharing for head in group), []).append(index)
    return cells


def select_sharing(groups: Round, movements: Tensor, sharing: int) -> tuple[Round, tuple[int, ...]]:
    """`select` of heads that share keys: of merged key/value heads that whose heads move the output most stays, and of
    each group the head on it that moves it most.

    Args:
        groups: the heads behind each merged one.
        movements: of each head, (M,).
        sharing: r.

    Returns:
        The groups, those that share a key one after the other, and the head whose queries each keeps.
    """
    ordered, selected = [], []
    by_key = movements.unflatten(0, (-1, sharing)).sum(1)
    for keys, cell in cells_of(groups, sharing).items():
        stays = max(sorted(keys), key=lambda key: float(by_key[key]))
        for index in cell:
            on_it = [head for head in groups[index] if head // sharing == stays]
            ordered.append(groups[index])
            selected.append(max(on_it, key=lambda head: float(movements[head])))
    return tuple(ordered), tuple(selected)


def _assigned(losses: Mapping[Group, float], first: list[int], second: list[int]) -> list[Group]:
    """Each of some heads with one of as many others, at least loss."""
    pairs = [[(min(i, j), max(i, j)) for j in second] for i in first]
    rows, columns = linear_sum_assignment(np.array([[losses[pair] for pair in row] for row in pairs]))
    return [pairs[row][column] for row, column in zip(rows, columns, strict=True)]
