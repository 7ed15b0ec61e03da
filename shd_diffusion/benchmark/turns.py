"""Candidates that take turns, so that whatever else the machine does weighs on all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Literal

Clock = Literal["wall", "cpu"]
Seconds = dict[str, list[float]]
"""By candidate, of every round."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median over rounds with its quartiles."""

    median: float
    quartiles: tuple[float, float]


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Clock = "wall",
    warm: bool = True,
    done: Callable[[], object] = lambda: None,
) -> Seconds:
    """Time every candidate once a round. The order turns each round.

    Args:
        candidates: by name.
        rounds: at least one.
        clock: time that passed, or that the process computed.
        warm: run each once before it is timed: it then finds caches and memory as its own last run left them, and not
            as another candidate's.
        done: called after every turn.
    """
    names = list(candidates)
    read = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    seconds: Seconds = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if warm:
                candidates[name]()
            started = read()
            candidates[name]()
            seconds[name].append(read() - started)
            done()
    return seconds


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of one value, that value."""
    if len(values) == 1:
        return Spread(values[0], (values[0], values[0]))
    low, _, high = quantiles(values, n=4, method="inclusive")
    return Spread(median(values), (low, high))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Of the quotients of two candidates, round by round: they were timed one after the other."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])
