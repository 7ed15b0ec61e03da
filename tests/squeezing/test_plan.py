import random

import pytest

from shd_diffusion.squeezing import plan_merges, plans_from_json, plans_to_json
from shd_diffusion.squeezing.plan import BlockPlan, check_merge, check_plan, members, plan_groups


@pytest.mark.parametrize("heads", range(1, 41))
def test_every_target_up_to_40_is_reached_exactly(heads):
    for target in range(1, heads + 1):
        plan = plan_merges(heads, target)
        check_plan(plan, heads, target)
        count = heads
        for groups in plan:
            assert {len(group) for group in groups} <= {1, 2}
            assert count - len(groups) == min(count // 2, count - target)
            count = len(groups)
        assert count == target
        assert sorted(head for group in members(plan, heads) for head in group) == list(range(heads))


def test_the_plans_of_the_method_page():
    assert plan_merges(12, 5) == (
        ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 11)),
        ((0, 1), (2,), (3,), (4,), (5,)),
    )
    counts = {(9, 3): [5, 3], (12, 6): [6], (25, 12): [13, 12], (16, 6): [8, 6], (40, 32): [32], (7, 7): []}
    for (heads, target), after in counts.items():
        assert [len(groups) for groups in plan_merges(heads, target)] == after


@pytest.mark.parametrize(("heads", "target"), [(5, 6), (5, 0), (1, -1)])
def test_an_impossible_squeeze_names_both_counts(heads, target):
    with pytest.raises(ValueError, match=f"{heads} .*{target}"):
        plan_merges(heads, target)


@pytest.mark.parametrize(
    "plan", [(((0, 1),),), (((0, 1), (1, 2)),), (((0, 1), (2,), ()),), (((0,), (1,), (2,)),)]
)
def test_a_plan_that_does_not_fit_is_refused(plan):
    with pytest.raises(ValueError, match="plan"):
        check_plan(plan, 3, 2)


def test_plans_come_back_from_json():
    plans = {"a": BlockPlan(plan_merges(12, 5), "t"), "b": BlockPlan(())}
    assert plans_from_json(plans_to_json(plans)) == plans
    assert plans_from_json('{"a": [[[0, 1], [2]]]}') == {
        "a": BlockPlan((((0, 1), (2,)),))
    }  # as they once were


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_ends_in_the_groups_that_it_was_made_of(seed):
    draw = random.Random(seed)
    heads = draw.randrange(1, 30)
    order, cuts = (
        draw.sample(range(heads), heads),
        sorted(draw.sample(range(1, heads), draw.randrange(heads))),
    )
    groups = tuple(tuple(order[a:b]) for a, b in zip([0, *cuts], [*cuts, heads], strict=True))
    plan = plan_groups(groups)
    check_plan(plan, heads, len(groups))
    check_merge(plan, "progressive")
    assert members(plan, heads) == groups


def test_groups_that_leave_heads_out_make_no_plan():
    with pytest.raises(ValueError, match="each of its 2 input heads once"):
        plan_groups(((0,), (2,)))
