"""What goes beyond the paper: joint merges, matched pairs, coefficients by row, and that they never lose more."""

from itertools import combinations

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from shd_diffusion.squeezing import match_merges, plan_merges, squeeze_heads
from shd_diffusion.squeezing.map_stream import whole
from shd_diffusion.squeezing.matching import minimum_matching
from shd_diffusion.squeezing.simplex import minimum_norm_weights


def by_scipy(gram):
    count = len(gram)
    found = [
        minimize(
            lambda w: w @ gram @ w,
            start,
            jac=lambda w: 2 * gram @ w,
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        for start in (np.full(count, 1 / count), *np.eye(count))
    ]
    # onto the simplex to the last digit, so that no infeasible point looks better
    points = [np.clip(result.x, 0, 1) / np.clip(result.x, 0, 1).sum() for result in found]
    best = min(points, key=lambda w: w @ gram @ w)
    return best, best @ gram @ best


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_the_joint_solver_equals_scipy(count):
    generator = np.random.default_rng(count)
    points = generator.normal(size=(12, count, 2 * count)) + generator.normal(size=(12, 1, 2 * count))
    grams = points @ points.transpose(0, 2, 1)
    weights = minimum_norm_weights(torch.from_numpy(grams)).numpy()
    for gram, weight in zip(grams, weights, strict=True):
        expected, value = by_scipy(gram)
        assert weight @ gram @ weight <= value * (1 + 1e-9) + 1e-12
        np.testing.assert_allclose(weight, expected, atol=2e-4)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 12), rank=st.integers(0, 12), seed=st.integers(0, 2**16))
def test_the_joint_solver_meets_the_conditions_of_optimality(count, rank, seed):
    points = np.random.default_rng(seed).normal(size=(5, count, rank))
    points[:, -1] = points[:, 0]  # ties and flat directions
    gram = torch.from_numpy(points @ points.transpose(0, 2, 1))
    weights = minimum_norm_weights(gram)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, dtype=weights.dtype))
    assert (weights >= 0).all()
    slope = (gram @ weights[..., None])[..., 0]
    # nowhere on the simplex does it go further down: every slope is at least the value
    value = (weights * slope).sum(-1, keepdim=True)
    assert (slope - value >= -1e-9 * (1 + gram.abs().amax())).all()


def test_the_joint_solver_on_zero_and_on_nan():
    assert torch.equal(minimum_norm_weights(torch.zeros(2, 4, 4)), torch.full((2, 4), 0.25))
    assert minimum_norm_weights(torch.full((1, 3, 3), torch.nan)).isnan().all()


@pytest.mark.parametrize(("heads", "target"), [(3, 1), (5, 2), (8, 2), (16, 6)])
@pytest.mark.parametrize("granularity", ["sample", "row"])
def test_a_joint_merge_is_the_least_squares_solution(heads, target, granularity):
    maps, values, weight = oracles.random_block(1, heads, 5, 6, 3, 12, seed=heads)
    squeezed = squeeze_heads(maps, values, weight, target, merge="joint", granularity=granularity)
    x = oracles.contributions(values, weight)[0]
    a = maps[0].numpy()
    groups = [np.flatnonzero(row) for row in squeeze_heads(
        maps, values, weight, target, coefficient="mean", return_details=True
    )[1].weights[0].numpy()]  # fmt: skip
    for head, group in enumerate(groups):
        total = sum(x[h] for h in group)
        for rows in [slice(r, r + 1) for r in range(5)] if granularity == "row" else [slice(None)]:
            output = sum(a[h][rows] @ x[h] for h in group)
            losses = np.stack([(output - a[h][rows] @ total).ravel() for h in group])
            _, best = by_scipy(losses @ losses.T)
            lost = ((output - squeezed[0, head].numpy()[rows] @ total) ** 2).sum()
            assert lost == pytest.approx(best, rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(heads=st.integers(2, 9), data=st.data(), seed=st.integers(0, 2**16))
def test_joint_and_row_never_lose_more(heads, data, seed):
    target = data.draw(st.integers(1, heads - 1))
    block = oracles.random_block(2, heads, 4, 5, 3, 6, seed=seed)

    def residual(**options):
        return squeeze_heads(*block, target, return_details=True, **options)[1].residual

    for granularity in ("sample", "row"):
        progressive = residual(granularity=granularity)
        assert (residual(granularity=granularity, merge="joint") <= progressive + 1e-7).all()
        assert (progressive <= residual(granularity=granularity, coefficient="select") + 1e-7).all() or len(
            plan_merges(heads, target)
        ) > 1
    if len(plan_merges(heads, target)) == 1:  # in a later round the heads to merge are others
        assert (residual(granularity="row") <= residual() + 1e-7).all()
    assert (residual(granularity="row", merge="joint") <= residual(merge="joint") + 1e-7).all()


@pytest.mark.parametrize(("heads", "target"), [(2, 1), (4, 2), (6, 4), (7, 4)])
@pytest.mark.parametrize("coefficient", ["closed_form", "mean", "select"])
def test_one_round_is_matched_as_well_as_by_trying_all(heads, target, coefficient):
    batches = [oracles.random_block(2, heads, 4, 5, 3, 6, seed=seed)[:2] for seed in (1, 2)]
    weight = oracles.random_block(1, heads, 4, 5, 3, 6)[2]

    def lost(plan):
        return sum(
            oracles.squeeze(maps, values, weight, plan, alpha=ALPHA[coefficient])[1].sum()
            for maps, values in batches
        )

    plan = match_merges(
        [(whole(maps), values) for maps, values in batches], weight, target, coefficient=coefficient
    )
    assert len(plan) == 1
    assert lost(plan) == pytest.approx(min(map(lost, one_round_plans(heads, heads - target))))


ALPHA = {"closed_form": oracles.best_alpha, "mean": oracles.mean_alpha, "select": oracles.select_alpha}


def one_round_plans(heads, merges):
    for pairs in combinations(list(combinations(range(heads), 2)), merges):
        used = [head for pair in pairs for head in pair]
        if len(set(used)) == len(used):
            yield ((*pairs, *((head,) for head in range(heads) if head not in used)),)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(2, 9),
    data=st.data(),
    merge=st.sampled_from(["progressive", "joint"]),
    granularity=st.sampled_from(["sample", "row"]),
    seed=st.integers(0, 2**16),
)
def test_matched_never_loses_more_than_adjacent(heads, data, merge, granularity, seed):
    target = data.draw(st.integers(1, heads - 1))
    maps, values, weight = oracles.random_block(2, heads, 4, 5, 3, 6, seed=seed)
    options = {"merge": merge, "granularity": granularity, "return_details": True}

    def lost(pairing):
        squeezed, details = squeeze_heads(maps, values, weight, target, pairing=pairing, **options)
        x, total = oracles.contributions(values, weight), 0.0
        for sample in range(2):
            for head in range(target):
                weights = details.weights[sample, head].reshape(heads, -1)
                # a head may have weight 0 in a joint merge and still belong to the group
                group = owners[pairing][head]
                assert not weights[[h for h in range(heads) if h not in group]].any()
                total += oracles.group_error(
                    squeezed[sample, head].numpy(), maps[sample].numpy(), x[sample], group
                )[0]
        return total

    owners = {}
    for pairing in ("adjacent", "matched"):
        plan = plan_merges(heads, target)
        if pairing == "matched":
            plan = match_merges([(whole(maps), values)], weight, target, granularity, merge)
        groups = [[head] for head in range(heads)]
        for merged in plan:
            groups = [[head for part in group for head in groups[part]] for group in merged]
        owners[pairing] = groups
    assert lost("matched") <= lost("adjacent") * (1 + 1e-9) + 1e-12


def test_matching_leaves_the_heads_alone_that_merge_worst():
    losses = {(0, 1): 5.0, (0, 2): 1.0, (0, 3): 5.0, (1, 2): 5.0, (1, 3): 4.0, (2, 3): 9.0}
    assert minimum_matching(losses, 4, 1) == [(0, 2)]
    assert minimum_matching(losses, 4, 2) == [(0, 2), (1, 3)]
