"""Which heads to merge so that the merges lose least: beyond the paper's adjacent pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import isfinite
from typing import TypeAlias

import networkx
import torch
from torch import Tensor

from shd_diffusion.squeezing.coefficients import Coefficient, closed_form, select
from shd_diffusion.squeezing.map_stream import MapStream
from shd_diffusion.squeezing.merge_weights import (
    Granularity,
    identity_weights,
    joined,
    merge_step,
    merge_sums,
    merge_weights,
    mixing_weights,
    prepare_squeezer,
)
from shd_diffusion.squeezing.plan import Group, Merge, Plan, Round, check_heads, num_merges, plan_merges
from shd_diffusion.squeezing.residual import residual_energies

Batches: TypeAlias = Sequence[tuple[MapStream, Tensor]]
"""Calibration batches of one block: the teacher's maps (B, M, Q, K) and values (B, M, K, d)."""

Choice: TypeAlias = Callable[[Round, Mapping[Group, float]], list[Group]]
"""(the teacher's heads behind each head of a round, what each pair of these loses) to the pairs that merge."""


@torch.no_grad()
def match_merges(
    batches: Batches,
    output_weight: Tensor,
    target: int,
    granularity: Granularity = "sample",
    merge: Merge = "progressive",
    coefficient: Coefficient = "closed_form",
) -> Plan:
    """The plan whose merges lose least in total on calibration batches, one minimum-weight matching a round.

    A round's matching is exact, a sequence of them need not be: where it loses more than the adjacent plan,
    which takes several rounds to happen, the adjacent plan is returned. The options are those of `squeeze_heads`.

    Raises:
        ValueError: more target heads than the teacher has, or numbers that are not finite.
    """
    num_heads = batches[0][1].shape[1]
    plan = merge_rounds(batches, output_weight, target, matched_pairs(target), granularity, coefficient)

    def lost(candidate: Plan) -> float:
        squeezer = prepare_squeezer(candidate, output_weight, num_heads, merge)
        total = 0.0
        for maps, values in batches:
            found, _ = mixing_weights(maps, values, squeezer, granularity, coefficient)
            total += residual_energies(maps, values, output_weight, found, squeezer.groups)[0].sum().item()
        return total

    return min(plan_merges(num_heads, target), plan, key=lost)


def matched_pairs(target: int) -> Choice:
    """As many pairs as a round merges, of least total loss."""
    return lambda behind, losses: minimum_matching(losses, len(behind), num_merges(len(behind), target))


@torch.no_grad()
def merge_rounds(
    batches: Batches,
    output_weight: Tensor,
    target: int,
    choice: Choice,
    granularity: Granularity = "sample",
    coefficient: Coefficient = "closed_form",
) -> Plan:
    """The plan that a choice of pairs leads to, round by round, on calibration batches.

    Raises:
        ValueError: more target heads than the teacher has, or numbers that are not finite.
    """
    num_heads = batches[0][1].shape[1]
    check_heads(num_heads, target)
    behind: Round = tuple((head,) for head in range(num_heads))
    weights = [identity_weights(values) for _, values in batches]
    plan: list[Round] = []
    while len(behind) > target:
        losses: dict[Group, float] = dict.fromkeys(combinations(range(len(behind)), 2), 0.0)
        merged: list[dict[Group, Tensor]] = [{} for _ in batches]
        for pair in losses:
            step = merge_step([pair], behind, output_weight)
            for (maps, values), weight, into in zip(batches, weights, merged, strict=True):
                sums = merge_sums(step, maps, values, weight, granularity == "row")[:, :, 0]
                alpha = _share(sums, coefficient)
                losses[pair] += _loss(sums, alpha).double().sum().item()
                into[pair] = torch.lerp(weight[:, pair[1]], weight[:, pair[0]], alpha[:, None])
        if not all(map(isfinite, losses.values())):
            raise ValueError("attention maps or values are not finite")
        pairs = choice(behind, losses)
        groups = round_of(pairs, len(behind))
        weights = [merge_weights(weight, groups, of) for weight, of in zip(weights, merged, strict=True)]
        behind = tuple(joined(behind[head] for head in group) for group in groups)
        plan.append(groups)
    return tuple(plan)


def round_of(pairs: Sequence[Group], heads: int) -> Round:
    """A round that merges these pairs of so many heads."""
    alone = set(range(heads)) - {head for pair in pairs for head in pair}
    return tuple(sorted([*pairs, *((head,) for head in alone)]))


def minimum_matching(losses: Mapping[Group, float], heads: int, merges: int) -> list[Group]:
    """The `merges` disjoint pairs of least total loss.

    Heads that are to stay alone are matched, at no loss, to as many nodes that stand for staying alone.
    """
    largest = max(losses.values()) or 1.0
    graph = networkx.Graph()
    graph.add_weighted_edges_from((*pair, loss / largest) for pair, loss in losses.items())
    graph.add_weighted_edges_from(
        (head, -1 - stay, 0.0) for stay in range(heads - 2 * merges) for head in range(heads)
    )
    matched = networkx.min_weight_matching(graph)
    return sorted((min(pair), max(pair)) for pair in matched if min(pair) >= 0)


def _share(sums: Tensor, coefficient: Coefficient) -> Tensor:
    match coefficient:
        case "closed_form":
            return closed_form(sums)
        case "select":
            return select(sums)
        case "mean":
            return torch.full_like(sums[0], 0.5)


def _loss(sums: Tensor, alpha: Tensor) -> Tensor:
    """|(1 - α) D X_p - α D X_q|², the error of a merge."""
    first, mixed, second = sums
    return (1 - alpha) ** 2 * first - 2 * alpha * (1 - alpha) * mixed + alpha**2 * second
