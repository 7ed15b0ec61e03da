"""Turns, medians and ratios, against numpy and by hand."""

from __future__ import annotations

import time

import numpy as np
import pytest

from shd_diffusion.benchmark.turns import ratio, spread, take_turns


def test_the_order_turns_and_each_runs_once_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    now = [0.0]
    length = {"a": 1.0, "b": 10.0, "c": 100.0}

    def run(name: str) -> None:
        ran.append(name)
        now[0] += length[name] * (1 + ran.count(name))

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    candidates = {name: (lambda name=name: run(name)) for name in length}
    seconds = take_turns(candidates, rounds=3)
    assert "".join(ran) == "aabbccbbccaaccaabb"
    # each is timed at its second, fourth and sixth run
    assert seconds == {name: [3 * each, 5 * each, 7 * each] for name, each in length.items()}
    ran.clear()
    turns: list[int] = []
    take_turns(candidates, rounds=2, warm=False, done=lambda: turns.append(len(ran)))
    assert "".join(ran) == "abcbca" and turns == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11])
def test_spreads_are_numpys_quantiles(count: int) -> None:
    numbers = np.random.default_rng(count)
    first, other = numbers.uniform(1, 2, (2, count))
    for found, expected in ((spread(list(first)), first), (ratio(list(other), list(first)), other / first)):
        low, middle, high = np.quantile(expected, [0.25, 0.5, 0.75])
        assert found.median == pytest.approx(middle, rel=1e-12)
        assert found.quartiles == pytest.approx((low, high), rel=1e-12)
