"""Which option of every part to take for a budget, where some parts leave with the block that they are in.

A multiple-choice knapsack: of each part one option, losses and savings added up (docs/method.md section 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array


@dataclass(frozen=True, slots=True)
class Option:
    """What a part may become: what is lost by it, and what it saves, in any unit."""

    lost: float
    saved: float


@dataclass(frozen=True, slots=True)
class Block:
    """What may leave as a whole: what is lost and saved then, its parts included, and which parts are in it."""

    leaving: Option
    parts: frozenset[str]


@dataclass(frozen=True, slots=True)
class Choice:
    """The best options.

    Attributes:
        options: index of the option by part, of the parts that stay.
        removed: blocks that leave, in their order.
    """

    options: dict[str, int]
    removed: tuple[str, ...]


def choose_options(
    parts: Mapping[str, Sequence[Option]], blocks: Mapping[str, Block], needed: float
) -> Choice:
    """The options of least total loss that save enough; exact, by branch and bound (HiGHS).

    Args:
        parts: options of each; to stay as it is, is one of them where that may be.
        blocks: none, or several of which one at least stays.
        needed: what must be saved in total.

    Raises:
        ValueError: so much cannot be saved.
    """
    if needed > most_saved(parts, blocks):
        raise ValueError(f"{needed} cannot be saved: {most_saved(parts, blocks)} can")
    choices = [(name, index) for name, options in parts.items() for index in range(len(options))]
    options = [parts[name][index] for name, index in choices] + [each.leaving for each in blocks.values()]
    lost, saved = (np.array([getattr(option, key) for option in options]) for key in ("lost", "saved"))
    rows = {name: row for row, name in enumerate(parts)}
    # x in {0, 1} for each option of a part, then for each block that leaves
    once = lil_array((len(parts), len(options)))  # one option of each part, or its block leaves
    for column, (name, _) in enumerate(choices):
        once[rows[name], column] = 1
    for column, block in enumerate(blocks.values(), len(choices)):
        for name in block.parts:
            once[rows[name], column] = 1
    scale = max(np.abs(saved).max(initial=0), np.finfo(float).tiny)
    constraints = [LinearConstraint(saved[None] / scale, lb=needed / scale - 1e-9)]
    if parts:
        constraints.append(LinearConstraint(once.tocsr(), lb=1, ub=1))
    if blocks:
        leaving = np.arange(len(options)) >= len(choices)
        constraints.append(LinearConstraint(leaving[None].astype(float), ub=len(blocks) - 1))
    most, taken = np.ones(len(options)), np.ones(len(options), dtype=bool)
    for _ in range(2):
        # The solver stops within 1e-6 of the best in its unit, the total of what is taken: first of all options, then
        # of those found, which no better choice can exceed by one option alone.
        unit = max(lost[taken].sum(), np.finfo(float).tiny)
        most[lost > unit] = 0
        found = milp(
            lost / unit,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, most),
            constraints=constraints,
            options={"mip_rel_gap": 0},
        )
        taken = found.x > 0.5
    return Choice(
        {name: index for (name, index), is_taken in zip(choices, taken, strict=False) if is_taken},
        tuple(name for name, is_taken in zip(blocks, taken[len(choices) :], strict=True) if is_taken),
    )


def most_saved(parts: Mapping[str, Sequence[Option]], blocks: Mapping[str, Block]) -> float:
    """What is saved at most: the largest saving of every part, or of its block where that saves more, but of one."""
    best = {name: max(option.saved for option in options) for name, options in parts.items()}
    more = sorted(block.leaving.saved - sum(best[name] for name in block.parts) for block in blocks.values())
    return sum(best.values()) + sum(gain for gain in more[1:] if gain > 0)
