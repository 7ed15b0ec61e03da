"""How two heads differ, against the literal form in float64."""

from __future__ import annotations

import numpy as np
import oracles
import torch
from analysis.records import random_record

from shd_diffusion.analysis.pairs import compare_pairs, total_variation


def test_pairs_against_the_literal_form() -> None:
    record, pairs = random_record(), [(0, 1), (2, 3), (5, 4)]
    found = compare_pairs(record, pairs)
    maps, x = record.maps().numpy(), oracles.contributions(record.value, record.output_weight)
    for sample in range(3):
        for place, (p, q) in enumerate(pairs):
            a, b, s, t = maps[sample, p], maps[sample, q], x[sample, p], x[sample, q]
            alpha = oracles.best_alpha(a, b, s, t)
            at_best, at_half = (oracles.squared_error(at, a, b, s, t) for at in (alpha, 0.5))
            first, second = (a @ s).ravel(), (b @ t).ravel()
            expected = {
                "total_variation": np.abs(a - b).sum(1).mean() / 2,
                "cosine": first @ second / np.linalg.norm(first) / np.linalg.norm(second),
                "strength": np.linalg.norm((a - b) @ s) / np.linalg.norm((a - b) @ t),
                "saved": 1 - at_best / at_half,
            }
            for name, value in expected.items():
                np.testing.assert_allclose(
                    getattr(found, name)[sample, place], value, rtol=1e-9, err_msg=name
                )


def test_the_coefficient_leaves_one_half_as_far_as_heads_differ_in_strength() -> None:
    record = random_record()
    maps, x = record.maps().numpy()[0], oracles.contributions(record.value, record.output_weight)[0]
    difference = maps[0] - maps[1]
    of_first, of_second = difference @ x[0], difference @ x[1]
    imbalance = (of_first**2).sum() - (of_second**2).sum()
    expected = 0.5 + imbalance / (2 * ((of_first + of_second) ** 2).sum())
    assert 0 < expected < 0.5  # head 1 is three times as strong
    np.testing.assert_allclose(oracles.best_alpha(maps[0], maps[1], x[0], x[1]), expected)


def test_pairs_whose_coefficient_is_clipped() -> None:
    record = random_record(samples=40)
    found = compare_pairs(record, [(2, 3)])
    maps, x = record.maps().numpy(), oracles.contributions(record.value, record.output_weight)
    alphas = [oracles.best_alpha(m[2], m[3], y[2], y[3]) for m, y in zip(maps, x, strict=True)]
    assert max(alphas) == 1
    sample = int(np.argmax(alphas))
    errors = [oracles.squared_error(at, *maps[sample, [2, 3]], *x[sample, [2, 3]]) for at in (1, 0.5)]
    np.testing.assert_allclose(found.saved[sample, 0], 1 - errors[0] / errors[1], rtol=1e-9)


def test_equal_heads_save_nothing_and_differ_in_nothing() -> None:
    record = random_record()
    found = compare_pairs(record, [(1, 1)])
    assert found.total_variation.max() == 0 and found.saved.max() == 0 and (found.strength == 1).all()
    torch.testing.assert_close(found.cosine, torch.ones_like(found.cosine))


def test_distances_between_all_heads() -> None:
    maps = random_record().maps()
    found = total_variation(maps)
    expected = (maps[:, :, None] - maps[:, None]).abs().sum(-1).mean(-1) / 2
    torch.testing.assert_close(found, expected)
