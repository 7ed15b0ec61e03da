"""Which heads merge when: plans, the rule of the rounds, and what a plan leaves of the heads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, TypeAdapter

PLANS_FILE = "merge_plans.json"
"""Plans by block, beside a model whose heads were merged by them, and in a run that found some."""

Merge = Literal["progressive", "joint"]
"""Pair by pair, or each final group at once."""

Group: TypeAlias = tuple[int, ...]
Round: TypeAlias = tuple[Group, ...]
Plan: TypeAlias = tuple[Round, ...]
"""Rounds of groups; a group lists heads *of that round's input*, heads that stay alone as 1-tuples."""


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """The plan of a student's block, and the teacher's block whose heads merge by it; None where that is not told."""

    plan: Plan
    teacher: str | None = None


StoredPlan = Annotated[
    BlockPlan, BeforeValidator(lambda entry: {"plan": entry} if isinstance(entry, list) else entry)
]
"""In JSON; files once held the plan alone."""


def num_merges(heads: int, target: int) -> int:
    """Merges in one round from `heads` towards `target` heads: each head at most once, never past the target."""
    return min(heads // 2, heads - target)


def plan_merges(num_heads: int, target: int) -> Plan:
    """The paper's plan, completed (docs/method.md section 4): each round merges the first adjacent pairs.

    Args:
        num_heads: M, the teacher's heads.
        target: N, the student's heads, 1 <= N <= M.

    Returns:
        The rounds. 12 -> 5 is `((0, 1), (2, 3), ..., (10, 11))` and then `((0, 1), (2,), (3,), (4,), (5,))`;
        M = N is `()`, the identity.

    Raises:
        ValueError: N > M or N < 1.
    """
    check_heads(num_heads, target)
    plan: list[Round] = []
    while num_heads > target:
        merges = num_merges(num_heads, target)
        pairs = [(2 * i, 2 * i + 1) for i in range(merges)]
        plan.append((*pairs, *((head,) for head in range(2 * merges, num_heads))))
        num_heads -= merges
    return tuple(plan)


def check_heads(num_heads: int, target: int) -> None:
    """Raise ValueError unless `num_heads` can be squeezed to `target`."""
    if not 1 <= target <= num_heads:
        raise ValueError(
            f"{num_heads} teacher heads cannot be squeezed to {target} student heads: 1 to {num_heads} can"
        )


def check_plan(plan: Plan, num_heads: int, target: int) -> None:
    """Raise ValueError unless the plan uses every head once a round and ends at `target` heads."""
    check_heads(num_heads, target)
    heads = num_heads
    for index, groups in enumerate(plan):
        if sorted(head for group in groups for head in group) != list(range(heads)) or () in groups:
            raise ValueError(
                f"round {index} of the plan must name each of its {heads} input heads once: {groups}"
            )
        heads = len(groups)
    if heads != target:
        raise ValueError(f"the plan leads from {num_heads} to {heads} heads, not to {target}")


def check_merge(plan: Plan, merge: Merge) -> None:
    """Raise ValueError unless the plan's groups are of a size that the merge takes."""
    for group in (group for groups in plan for group in groups):
        if merge == "progressive" and len(group) > 2:
            raise ValueError(f"a progressive merge takes two heads, not {group}; merge='joint' takes more")


def members(plan: Plan, num_heads: int) -> Round:
    """The teacher heads behind each squeezed head, in the order in which they were merged."""
    groups: Round = tuple((head,) for head in range(num_heads))
    for merged in plan:
        groups = tuple(tuple(head for part in group for head in groups[part]) for group in merged)
    return groups


def plan_groups(groups: Sequence[Group]) -> Plan:
    """The plan that ends in these groups of the teacher's heads, in this order; in each group neighbours merge.

    Raises:
        ValueError: the groups do not name each head of 0..M-1 once.
    """
    check_plan((tuple(groups),), sum(map(len, groups)), len(groups))
    plan: list[Round] = []
    while any(len(group) > 1 for group in groups):
        pairs = [group[i : i + 2] for group in groups for i in range(0, len(group), 2)]
        left = iter(range(len(pairs)))
        groups = [tuple(next(left) for _ in range(0, len(group), 2)) for group in groups]
        plan.append(tuple(pairs))
    if not plan and list(groups) != [(head,) for head in range(len(groups))]:
        plan.append(tuple(groups))  # nothing merges, but the order is another
    return tuple(plan)


def parse_plan(rounds: Iterable[Iterable[Sequence[int]]]) -> Plan:
    """A plan from nested lists, as JSON and YAML have them."""
    return tuple(tuple(tuple(group) for group in groups) for groups in rounds)


def plans_to_json(plans: Mapping[str, BlockPlan]) -> str:
    """Plans by student block as JSON."""
    return json.dumps({name: asdict(plan) for name, plan in plans.items()}, indent=1)


def plans_from_json(text: str) -> dict[str, BlockPlan]:
    """What `plans_to_json` wrote.

    Raises:
        ValueError: it did not.
    """
    return TypeAdapter(dict[str, StoredPlan]).validate_json(text)
