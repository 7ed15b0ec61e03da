"""The shape of a smaller model for a budget: what stays and what goes (docs/method.md section 8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from diffusers import ModelMixin

from shd_diffusion.attention import attention_blocks
from shd_diffusion.compression.attention import HeadOptions
from shd_diffusion.compression.costs import UNITS, Costs, Unit, measure_costs
from shd_diffusion.compression.depth import block_list, removable_blocks
from shd_diffusion.compression.importance import (
    Importance,
    measure_importance,
    possible_counts,
)
from shd_diffusion.compression.walk import CalibrationBatch, Predict
from shd_diffusion.errors import UserError, did_you_mean
from shd_diffusion.models.squeezed import shape, squeezed_class
from shd_diffusion.squeezing.knapsack import Block, Option, choose_options, most_saved


@dataclass(frozen=True, slots=True)
class Budget:
    """What a model may cost.

    Attributes:
        unit: in what its cost is measured.
        share: of the teacher's.
    """

    unit: Unit
    share: float


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """What is to become of an attention block, a feed-forward layer, or a block that leaves.

    Attributes:
        name: module path in the teacher.
        what: it has fewer of.
        before: how many it has.
        keeps: how many stay.
        lost: |change|² / |output|² of the model by this alone.
        saved: of the cost.
    """

    name: str
    what: Literal["heads", "neurons", "block"]
    before: int
    keeps: int
    lost: float
    saved: float


@dataclass(frozen=True, slots=True)
class ShapePlan:
    """A shape within a budget.

    Attributes:
        budget: that was asked for.
        before: what the teacher costs.
        after: what is to be left of it.
        parts: that lose something, in the model's order.
        blocks: that stay, by module path; None where all do.
    """

    budget: Budget
    before: float
    after: float
    parts: tuple[PlannedPart, ...]
    blocks: tuple[str, ...] | None

    @property
    def lost(self) -> float:
        """The sum over the parts."""
        return sum(part.lost for part in self.parts)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `compress` that make it so."""
        heads, neurons = (
            {part.name: part.keeps for part in self.parts if part.what == what} or None
            for what in ("heads", "neurons")
        )
        return {"heads": heads, "neurons": neurons, "blocks": self.blocks}


def parse_budget(text: str) -> Budget:
    """A budget such as `macs=0.5`.

    Raises:
        UserError: it is none.
    """
    unit, _, number = text.partition("=")
    if unit not in UNITS:
        hint = did_you_mean(unit, UNITS)
        raise UserError(f"--budget {text}: no budget is counted in `{unit}`; {hint}, such as macs=0.5")
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise UserError(
            f"--budget {text}: give a share of the teacher's above 0 and up to 1, such as {unit}=0.5"
        )
    return Budget(unit, share)


def plan_shape(
    teacher: ModelMixin,
    batches: Sequence[CalibrationBatch],
    predict: Predict,
    budget: Budget,
    one: CalibrationBatch,
    options: HeadOptions | None = None,
    report: Callable[[str], object] = lambda message: None,
) -> ShapePlan:
    """The shape that loses least within a budget, as far as what its parts lose adds up.

    Args:
        teacher: a diffusers model; it is put in evaluation mode and otherwise left as it is.
        batches: see `compress`.
        predict: see `compress`.
        budget: what it may cost.
        one: the batch of a call whose cost counts.
        options: how heads are squeezed.
        report: is told how far it is.

    Raises:
        ValueError: the model cannot be squeezed, or not so far.
    """
    options = options or HeadOptions()
    teacher.eval()
    counts, names = possible_counts(teacher, options), removable_blocks(teacher)
    if counts:
        kind: Any = type(teacher)
        squeezed_class(kind)  # refuses a class that cannot be saved
    report(f"what {len(counts)} parts and {len(names)} blocks cost, in {UNITS[budget.unit]}")
    if not counts and not names:
        raise ValueError(f"{type(teacher).__name__} has no heads, neurons or blocks that could leave")
    costs = measure_costs(teacher, budget.unit, counts, names, partial(predict, teacher, *one))
    if budget.share == 1:
        return ShapePlan(
            budget, costs.total, costs.total, (), None
        )  # without a part that is lost for nothing
    free = {name: dict.fromkeys(of_part, 0.0) for name, of_part in counts.items()}
    _check(budget, costs, *_problem(costs, free, dict.fromkeys(names, 0.0)))  # before what takes long
    importance = measure_importance(teacher, batches, predict, counts, names, options, report)
    return solve(teacher, budget, costs, importance)


def solve(teacher: ModelMixin, budget: Budget, costs: Costs, importance: Importance) -> ShapePlan:
    """The shape of least loss, by what everything costs and loses.

    Raises:
        ValueError: the budget cannot be had.
    """
    parts, blocks = _problem(costs, importance.parts, importance.blocks)
    _check(budget, costs, parts, blocks)
    choice = choose_options(parts, blocks, costs.total * (1 - budget.share))
    heads, have = attention_blocks(teacher), shape(teacher)
    planned = []
    for name, _ in teacher.named_modules():
        if name in choice.removed:
            planned.append(PlannedPart(name, "block", 1, 0, importance.blocks[name], costs.blocks[name]))
        elif choice.options.get(name):
            keeps = list(importance.parts[name])[choice.options[name] - 1]
            what: Literal["heads", "neurons"] = "heads" if name in heads else "neurons"
            option = parts[name][choice.options[name]]
            planned.append(PlannedPart(name, what, have[name], keeps, option.lost, option.saved))
    stay = None
    if choice.removed:
        stack, every = block_list(teacher)
        paths = (f"{stack}.{index}" for index in range(len(every)))
        stay = tuple(path for path in paths if path not in choice.removed)
    after = costs.total - sum(part.saved for part in planned)
    return ShapePlan(budget, costs.total, after, tuple(planned), stay)


def _problem(
    costs: Costs, losses: Mapping[str, Mapping[int, float]], importances: Mapping[str, float]
) -> tuple[dict[str, list[Option]], dict[str, Block]]:
    """The options of each part, the first to keep all, and the blocks that can leave."""
    parts = {
        name: [Option(0, 0), *(Option(lost, costs.saved[name][count]) for count, lost in of_part.items())]
        for name, of_part in losses.items()
    }
    blocks = {
        name: Block(
            Option(lost, costs.blocks[name]), frozenset(part for part in parts if part.startswith(f"{name}."))
        )
        for name, lost in importances.items()
    }
    return parts, blocks


def _check(
    budget: Budget, costs: Costs, parts: Mapping[str, Sequence[Option]], blocks: Mapping[str, Block]
) -> None:
    most = most_saved(parts, blocks)
    if most <= 0:
        raise ValueError(f"nothing that could leave saves {UNITS[budget.unit]}")
    least = 1 - most / costs.total
    if budget.share < least:
        shown = math.ceil(least * 1000) / 1000
        raise ValueError(f"the least that can be had is {budget.unit}={shown:g}")
