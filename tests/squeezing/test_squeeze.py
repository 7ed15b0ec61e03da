"""The squeeze against the literal oracle, and what must hold of it whatever the maps are."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shd_diffusion.squeezing import plan_merges, prepare_squeezer, squeeze_heads

SIZES = [(2, 1), (3, 2), (7, 2), (9, 3), (12, 5), (12, 6), (16, 6)]
ALPHA = {"closed_form": oracles.best_alpha, "mean": oracles.mean_alpha, "select": oracles.select_alpha}


@pytest.mark.parametrize("coefficient", ALPHA)
@pytest.mark.parametrize("granularity", ["sample", "row"])
@pytest.mark.parametrize(("heads", "target"), SIZES)
def test_progressive_merges_equal_the_literal_form(heads, target, granularity, coefficient):
    maps, values, weight = oracles.random_block(2, heads, 7, 9, 3, 11, seed=heads)
    squeezed, details = squeeze_heads(
        maps, values, weight, target, granularity=granularity, coefficient=coefficient, return_details=True
    )
    plan = oracles.adjacent_plan(heads, target)
    expected, errors = oracles.squeeze(maps, values, weight, plan, granularity == "row", ALPHA[coefficient])
    np.testing.assert_allclose(squeezed, expected, atol=1e-12)
    rebuilt = torch.einsum("bnmq,bmqk->bnqk", _by_row(details.weights, 7), maps)
    torch.testing.assert_close(rebuilt, squeezed)
    assert details.coefficients.shape[:2] == (2, heads - target)
    x = oracles.contributions(values, weight)
    for sample in range(2):
        for head, group in enumerate(_groups(plan, heads)):
            lost, total = oracles.group_error(expected[sample, head], maps[sample].numpy(), x[sample], group)
            assert lost == pytest.approx(errors[sample, head])
            assert details.residual[sample, head] == pytest.approx(np.sqrt(lost / total), abs=1e-6)


def test_alpha_is_the_minimum_of_a_brute_force_grid():
    grid = np.linspace(0, 1, 2001)
    for seed in range(20):
        maps, values, weight = oracles.random_block(1, 2, 5, 6, 2, 4, seed=seed)
        _, details = squeeze_heads(maps, values, weight, 1, return_details=True)
        (p, q), (x, y) = maps[0].numpy(), oracles.contributions(values, weight)[0]
        best = grid[np.argmin([oracles.squared_error(a, p, q, x, y) for a in grid])]
        assert details.coefficients.item() == pytest.approx(best, abs=5.1e-4)


def test_an_explicit_plan_and_a_prepared_one():
    maps, values, weight = oracles.random_block(2, 5, 4, 6, 3, 8)
    plan = (((0, 3), (4, 1), (2,)), ((2, 0), (1,)))
    expected, _ = oracles.squeeze(maps, values, weight, plan)
    np.testing.assert_allclose(squeeze_heads(maps, values, weight, 2, pairing=plan), expected, atol=1e-12)
    squeezer = prepare_squeezer(plan, weight, 5)
    np.testing.assert_allclose(
        squeeze_heads(maps, values, weight, 2, squeezer=squeezer), expected, atol=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 9),
    data=st.data(),
    granularity=st.sampled_from(["sample", "row"]),
    merge=st.sampled_from(["progressive", "joint"]),
    coefficient=st.sampled_from(["closed_form", "mean", "select"]),
    sharpness=st.sampled_from([0.0, 1.0, 40.0]),
    seed=st.integers(0, 2**16),
)
def test_squeezed_maps_are_distributions(heads, data, granularity, merge, coefficient, sharpness, seed):
    target = data.draw(st.integers(1, heads))
    generator = torch.Generator().manual_seed(seed)
    maps = (sharpness * torch.randn(2, heads, 4, 5, generator=generator)).softmax(-1)
    values, weight = (
        torch.randn(2, heads, 5, 3, generator=generator),
        torch.randn(6, heads * 3, generator=generator),
    )
    squeezed, details = squeeze_heads(
        maps,
        values,
        weight,
        target,
        granularity=granularity,
        merge=merge,
        coefficient=coefficient,
        return_details=True,
    )
    assert (squeezed >= 0).all()
    torch.testing.assert_close(squeezed.sum(-1), torch.ones(2, target, 4))
    assert (details.weights >= 0).all()
    torch.testing.assert_close(details.weights.sum(2), torch.ones_like(details.weights[:, :, 0]))
    if target == heads:
        assert torch.equal(squeezed, maps)


@settings(max_examples=40, deadline=None)
@given(granularity=st.sampled_from(["sample", "row"]), seed=st.integers(0, 2**16))
def test_the_order_of_a_pair_does_not_matter(granularity, seed):
    maps, values, weight = oracles.random_block(1, 2, 4, 5, 3, 6, seed=seed)
    swapped = weight.unflatten(1, (2, 3)).flip(1).flatten(1)
    torch.testing.assert_close(
        squeeze_heads(maps, values, weight, 1, granularity=granularity),
        squeeze_heads(maps.flip(1), values.flip(1), swapped, 1, granularity=granularity),
        atol=1e-9,
        rtol=0,
    )


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(2, 8),
    granularity=st.sampled_from(["sample", "row"]),
    merge=st.sampled_from(["progressive", "joint"]),
    seed=st.integers(0, 2**16),
)
def test_identical_heads_give_themselves(heads, granularity, merge, seed):
    maps, values, weight = oracles.random_block(1, heads, 4, 5, 3, 6, seed=seed, dtype=torch.float32)
    maps = maps[:, :1].expand(-1, heads, -1, -1)
    squeezed = squeeze_heads(maps, values, weight, 1, granularity=granularity, merge=merge)
    torch.testing.assert_close(squeezed[:, 0], maps[:, 0])


@pytest.mark.parametrize("granularity", ["sample", "row"])
def test_where_every_alpha_is_optimal_it_is_a_half(granularity):
    maps, values, weight = oracles.random_block(2, 2, 4, 5, 3, 6, dtype=torch.float32)
    same = maps[:, :1].expand(-1, 2, -1, -1)
    cancelling = values * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    cancelling[:, 1] = -cancelling[:, 0]
    equal = weight[:, :3].repeat(1, 2)
    for a, v, w in ((same, values, weight), (maps, cancelling, equal)):
        _, details = squeeze_heads(a, v, w, 1, granularity=granularity, return_details=True)
        assert (details.coefficients == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    maps, values, weight = (t.to(dtype) for t in oracles.random_block(2, 6, 8, 8, 4, 12, dtype=torch.float32))
    squeezed = squeeze_heads(maps, values, weight, 2)
    assert squeezed.dtype == torch.float32
    expected, _ = oracles.squeeze(maps, values, weight, oracles.adjacent_plan(6, 2))
    np.testing.assert_allclose(squeezed, expected, atol=1e-6)


def test_no_gradient_leaves_the_squeeze():
    maps, values, weight = (t.requires_grad_() for t in oracles.random_block(1, 4, 3, 3, 2, 5))
    assert not squeeze_heads(maps, values, weight, 2).requires_grad


@pytest.mark.parametrize("broken", ["maps", "values", "weight"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("coefficient", ["closed_form", "select"])
def test_numbers_that_are_not_finite_are_an_error(broken, number, coefficient):
    block = dict(zip(("maps", "values", "weight"), oracles.random_block(1, 4, 3, 3, 2, 5), strict=True))
    block[broken].view(-1)[0] = number
    with pytest.raises(ValueError, match="not finite"):
        squeeze_heads(block["maps"], block["values"], block["weight"], 2, coefficient=coefficient)


def test_shapes_that_do_not_fit_are_an_error():
    maps, values, weight = oracles.random_block(1, 4, 3, 5, 2, 6)
    with pytest.raises(ValueError, match="values"):
        squeeze_heads(maps, values[:, :, :4], weight, 2)
    with pytest.raises(ValueError, match="output weight"):
        squeeze_heads(maps, values, weight[:, :6], 2)
    with pytest.raises(ValueError, match=r"4 .* 5"):
        squeeze_heads(maps, values, weight, 5)
    with pytest.raises(ValueError, match="plan"):
        squeeze_heads(maps, values, weight, 2, pairing=plan_merges(4, 3))
    with pytest.raises(ValueError, match="the squeezer leads to 3 heads, not to 2"):
        squeeze_heads(maps, values, weight, 2, squeezer=prepare_squeezer(plan_merges(4, 3), weight, 4))
    with pytest.raises(ValueError, match="joint"):
        squeeze_heads(maps, values, weight, 2, pairing=(((0, 1, 2), (3,)),))


def _by_row(weights, rows):
    return weights if weights.ndim == 4 else weights[..., None].expand(-1, -1, -1, rows)


def _groups(plan, heads):
    groups = [[head] for head in range(heads)]
    for merged in plan:
        groups = [[head for part in group for head in groups[part]] for group in merged]
    return groups
