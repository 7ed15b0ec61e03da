"""Heads that are copies of others: who finds them, and when α matters."""

from __future__ import annotations

import torch
from analysis.records import random_record
from torch import Tensor

from shd_diffusion.analysis.strategies import STRATEGIES, by_teacher_head
from shd_diffusion.attention import AttentionRecord


def with_copies(share: float, order: list[int]) -> AttentionRecord:
    """A block of 3 heads as one of 6 that computes the same: each head twice, its output split by `share`."""
    record = random_record(heads=3)
    twice = [head for head in range(3) for _ in range(2)]
    weight = record.output_weight.unflatten(1, (3, -1))[:, twice]
    weight = weight * torch.tensor([share, 1 - share] * 3, dtype=weight.dtype)[:, None]
    query, key, value = (part[:, twice][:, order] for part in (record.query, record.key, record.value))
    return AttentionRecord("block", "self", query, key, value, weight[:, order].flatten(1), record.scale)


def residual(name: str, record: AttentionRecord, heads: int = 3) -> Tensor:
    strategy = STRATEGIES[name]
    _, details = strategy.explain(record, heads, strategy.plan(record, heads))
    return details.residual.square().sum()


SHUFFLED = [0, 2, 4, 1, 3, 5]


def test_copies_side_by_side_lose_nothing_whatever_the_coefficient() -> None:
    record = with_copies(0.8, [0, 1, 2, 3, 4, 5])
    for name in STRATEGIES:
        assert residual(name, record) < 1e-12


def test_only_matched_pairs_find_copies_that_are_apart() -> None:
    record = with_copies(0.8, SHUFFLED)
    for name in STRATEGIES:
        assert (residual(name, record) < 1e-12) == name.startswith("matched")


def test_the_closed_form_gains_where_copies_are_of_unequal_strength() -> None:
    """Each pair has the strong copy of one head and the weak copy of another."""
    order = [0, 3, 2, 5, 4, 1]
    gains = {}
    for share in (0.5, 0.9):
        record = with_copies(share, order)
        gains[share] = 1 - (residual("closed form", record) / residual("mean", record)).item()
    assert gains[0.9] > 0.5 and gains[0.9] > gains[0.5] >= 0


def test_every_teacher_head_gets_the_map_of_its_group() -> None:
    squeezed = torch.arange(3.0)[None, :, None, None].expand(2, 3, 4, 4)
    plan = (((0, 1), (2, 3), (4,)), ((0, 2), (1,)))
    found = by_teacher_head(squeezed, plan, 5)
    assert found[0, :, 0, 0].tolist() == [0, 0, 1, 1, 0]
