"""Channels of a stream: which stay, where they are placed, and the refit of what reads them."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import scipy.linalg
import torch

from shd_diffusion.squeezing.channels import Reader, choose_channels, place_channels, refit_layer
from shd_diffusion.squeezing.moments import Moments


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lost(inputs: list[np.ndarray], weights: list[np.ndarray], kept: tuple[int, ...]) -> float:
    """The readers' relative squared errors, each refitted by scipy to the kept channels."""
    total = 0.0
    for z, w in zip(inputs, weights, strict=True):
        target = z @ w
        fitted = scipy.linalg.lstsq(z[:, kept], target)[0]
        total += np.square(target - z[:, kept] @ fitted).sum() / np.square(target).sum()
    return total


def test_the_channel_that_leaves_is_the_one_that_harms_least_by_brute_force() -> None:
    inputs = [draw(60, 6, seed=s) @ draw(6, 6, seed=10 + s) for s in range(3)]
    weights = [draw(6, 4, seed=20 + s) for s in range(3)]
    readers = [Reader(z.T @ z, w) for z, w in zip(inputs, weights, strict=True)]
    left = tuple(range(6))
    for keep in (5, 4, 3):
        arrays = [z.numpy() for z in inputs], [w.numpy() for w in weights]
        left = min(combinations(left, keep), key=lambda kept: lost(*arrays, kept))
        assert tuple(choose_channels(readers, keep, strength=1e-12).tolist()) == left


def test_groups_keep_equally_many_by_brute_force() -> None:
    z = draw(80, 6) @ draw(6, 6, seed=10)
    z[:, :3] *= 0.01  # by themselves the first group's would all leave
    w = draw(6, 4, seed=20)
    left = tuple(range(6))
    for _ in range(2):
        possible = [kept for kept in combinations(left, len(left) - 1) if sum(j < 3 for j in kept) >= 2]
        possible = [kept for kept in possible if sum(j >= 3 for j in kept) >= 2]
        left = min(possible, key=lambda kept: lost([z.numpy()], [w.numpy()], kept))
    reader = Reader(z.T @ z, w)
    assert tuple(choose_channels([reader], 4, groups=2, strength=1e-12).tolist()) == left
    assert (choose_channels([reader], 4, strength=1e-12) < 3).sum() < 2


def test_a_channel_that_others_tell_leaves_before_a_small_one() -> None:
    z = draw(100, 4)
    z[:, 2] = z[:, 0] + z[:, 1]  # the largest
    z[:, 3] *= 0.1
    kept = choose_channels([Reader(z.T @ z, draw(4, 5, seed=1))], 3).tolist()
    assert 3 in kept and len(kept) == 3


def test_all_channels_stay() -> None:
    z = draw(50, 5)
    assert choose_channels([Reader(z.T @ z, draw(5, 2))], 5).tolist() == [0, 1, 2, 3, 4]


def test_channels_are_placed_where_the_positions_differ_least_but_for_constants() -> None:
    teacher, student = draw(9, 7), draw(9, 4, seed=1)
    kept = torch.tensor([0, 2, 3, 6])
    placed = place_channels(kept, teacher + draw(7, seed=2), student + 3)

    def differ(order: tuple[int, ...]) -> float:
        return float((teacher[:, list(order)] - student).var(0, correction=0).sum())

    assert tuple(placed.tolist()) == min(permutations(kept.tolist()), key=differ)


@pytest.mark.parametrize("bias", [False, True])
def test_the_refit_is_scipys_least_squares_with_a_pull_to_the_prior(bias: bool) -> None:
    z, y, prior = draw(80, 6), draw(80, 3, seed=1), draw(6, 3, seed=2)
    y = y + 2.0
    moments = Moments.zeros(6, 3)
    moments.add(z, y)
    fitted = moments.centred() if bias else moments
    weight = refit_layer(fitted, prior, strength=1e-2)
    centred = (z - z.mean(0), y - y.mean(0)) if bias else (z, y)
    pull = np.sqrt(1e-2 * np.square(centred[0].numpy()).sum() / 6)
    rows = np.concatenate([centred[0].numpy(), pull * np.eye(6)])
    targets = np.concatenate([centred[1].numpy(), pull * prior.numpy()])
    np.testing.assert_allclose(weight.numpy(), scipy.linalg.lstsq(rows, targets)[0], rtol=1e-8, atol=1e-10)
