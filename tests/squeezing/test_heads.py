"""Heads of a smaller block, against least squares on the rows themselves (numpy and scipy, float64)."""

import numpy as np
import pytest
import scipy.linalg
import torch

from shd_diffusion.squeezing.heads import (
    factor_queries_keys,
    head_movements,
    heads_to_keep,
    merge_values,
    refit_heads,
    select_heads,
    value_bases,
)
from shd_diffusion.squeezing.moments import Moments

ROWS, HEADS, INPUTS, WIDTH, CHANNELS = 60, 3, 5, 2, 6


def random_case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, torch.Tensor, torch.Tensor]:
    """Features of every head (T, N, c), targets that they explain in part, and V, O to start from."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(ROWS, HEADS, INPUTS)) + 0.5 * random.normal(size=(ROWS, 1, INPUTS))
    true = random.normal(size=(HEADS, INPUTS, CHANNELS))
    targets = np.einsum("tjc,jco->to", features, true) + random.normal(size=(ROWS, CHANNELS)) + 2
    start = random.normal(size=(HEADS, INPUTS, WIDTH)), random.normal(size=(HEADS, WIDTH, CHANNELS))
    return features, targets, *map(torch.from_numpy, start)


def moments_of(features: np.ndarray, targets: np.ndarray, batches: int = 3) -> Moments:
    flat = features.reshape(len(features), -1)
    moments = Moments.zeros(flat.shape[1], targets.shape[1])
    for rows in np.array_split(np.arange(len(flat)), batches):
        moments.add(torch.from_numpy(flat[rows]), torch.from_numpy(targets[rows]))
    return moments


def least_squares(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return scipy.linalg.lstsq(features, targets)[0]


def literal_refit(features, targets, values, outputs, rounds, penalty):
    """docs/method.md section 8, step 4, on the rows; the penalty as rows of its own."""
    _, heads, inputs = features.shape
    targets = np.concatenate([targets, np.zeros((heads * inputs, targets.shape[1]))])
    extra = np.sqrt(penalty) * np.eye(heads * inputs).reshape(-1, heads, inputs)
    features = np.concatenate([features, extra])
    width = values.shape[2]

    def circuits() -> list[np.ndarray]:
        return [v @ o for v, o in zip(values, outputs, strict=True)]

    def error() -> float:
        return float(((targets - sum(features[:, j] @ circuits()[j] for j in range(heads))) ** 2).sum())

    def fit_outputs() -> np.ndarray:
        mixed = np.concatenate([features[:, j] @ values[j] for j in range(heads)], 1)
        return least_squares(mixed, targets).reshape(heads, width, -1)

    errors = [error()]
    outputs = fit_outputs()
    errors.append(error())
    for _ in range(rounds):
        for j in range(heads):
            others = sum(features[:, i] @ circuits()[i] for i in range(heads) if i != j)
            values[j] = least_squares(features[:, j], targets - others) @ np.linalg.pinv(outputs[j])
        outputs = fit_outputs()
        errors.append(error())
    return circuits(), errors


@pytest.mark.parametrize("centre", [False, True])
def test_the_refit_is_least_squares_on_the_rows(centre):
    features, targets, values, outputs = random_case()
    moments = moments_of(features, targets)
    if centre:
        moments = moments.centred()
        features, targets = features - features.mean(0), targets - targets.mean(0)
    strength = 1e-2
    penalty = strength * np.mean(features.reshape(ROWS, -1) ** 2) * ROWS
    found_values, found_outputs, objective = refit_heads(moments, values, outputs, 3, strength)
    circuits, errors = literal_refit(features, targets, values.numpy().copy(), outputs.numpy(), 3, penalty)
    np.testing.assert_allclose(found_values @ found_outputs, np.stack(circuits), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(objective, errors, rtol=1e-9)


def test_the_objective_never_rises_and_is_what_it_says():
    for seed in range(5):
        features, targets, values, outputs = random_case(seed)
        moments = moments_of(features, targets)
        found_values, found_outputs, objective = refit_heads(moments, values, outputs, 6, 0.0)
        assert len(objective) == 2 + 6
        # a step may rise by the rounding of sums as large as the first objective
        assert all(np.diff(objective) <= 1e-12 * objective[0])
        assert objective[-1] < 0.9 * objective[0]
        fitted = np.einsum("tjc,jco->to", features, (found_values @ found_outputs).numpy())
        assert objective[-1] == pytest.approx(((targets - fitted) ** 2).sum(), rel=1e-9)


def test_one_head_as_wide_as_its_inputs_reaches_the_least_squares_solution():
    features, targets, _, _ = random_case()
    features = features[:, :1]
    one_column = torch.zeros(1, INPUTS, INPUTS)
    one_column[..., 0] = 1  # the others are drawn
    start = one_column, torch.zeros(1, INPUTS, CHANNELS)
    values, outputs, _ = refit_heads(moments_of(features, targets), *start, 1, 0.0)
    np.testing.assert_allclose((values @ outputs)[0], least_squares(features[:, 0], targets), rtol=1e-8)


def test_heads_that_explain_the_target_stay_as_they_are():
    features, _, values, outputs = random_case()
    circuits = values @ outputs
    targets = np.einsum("tjc,jco->to", features, circuits.numpy())
    found_values, found_outputs, objective = refit_heads(
        moments_of(features, targets), values, outputs, 2, 0.0
    )
    torch.testing.assert_close(found_values @ found_outputs, circuits, rtol=1e-7, atol=1e-7)
    assert max(objective) < 1e-10 * (targets**2).sum()


def test_the_refit_of_features_of_no_full_rank_is_finite():
    features, targets, values, outputs = random_case()
    features[:, 1] = features[:, 0]
    features[:, :, 4] = features[:, :, 3]
    values[2] = 0
    found_values, found_outputs, objective = refit_heads(
        moments_of(features, targets), values, outputs, 3, 0.0
    )
    assert (found_values @ found_outputs).isfinite().all()
    # rounding of 1e-16 comes back through a pseudo-inverse whose cut is at 1e-14
    assert all(np.diff(objective) <= 1e-9 * objective[0])


def test_moments_that_fit_no_heads_are_refused():
    with pytest.raises(ValueError, match="4 features do not fit 3 heads of 5 inputs"):
        refit_heads(Moments.zeros(4, CHANNELS), *random_case()[2:])


def test_fitted_values_and_outputs_are_balanced():
    """Of all factors V O of a circuit those with the least |V|² + |O|², where VᵀV = O Oᵀ."""
    features, targets, *start = random_case(2)
    values, outputs, _ = refit_heads(moments_of(features, targets), *start, 2, 1e-3)
    torch.testing.assert_close(values.mT @ values, outputs @ outputs.mT, rtol=1e-9, atol=1e-9)
    sizes = np.linalg.svd((values @ outputs).numpy(), compute_uv=False)[:, :WIDTH]  # the nuclear norm
    np.testing.assert_allclose(values.square().sum((1, 2)), sizes.sum(1), rtol=1e-9)


def test_values_merge_to_the_closest_of_their_rank():
    random = np.random.default_rng(4)
    values, outputs = random.normal(size=(4, 5, 2)), random.normal(size=(4, 2, 6))
    inputs = random.normal(size=(3, 30, 5))
    grams = torch.from_numpy(inputs.transpose(0, 2, 1) @ inputs)
    merged_values, merged_outputs = merge_values(
        torch.from_numpy(values), torch.from_numpy(outputs), [(0, 2), (1,), (3,)], grams, 2
    )
    pair = values[0] @ outputs[0] + values[2] @ outputs[2]
    left, sizes, right = np.linalg.svd(inputs[0] @ pair)
    circuits = (merged_values @ merged_outputs).numpy()
    np.testing.assert_allclose(inputs[0] @ circuits[0], (left[:, :2] * sizes[:2]) @ right[:2], atol=1e-10)
    np.testing.assert_allclose(circuits[1:], [values[h] @ outputs[h] for h in (1, 3)], atol=1e-12)


def test_bases_hold_the_merged_values_and_then_the_principal_directions():
    random = np.random.default_rng(8)
    values, inputs = random.normal(size=(2, 7, 5)), random.normal(size=(30, 7))
    values[0, :, 3:], values[1, :, 1:] = 0, 0
    found = value_bases(torch.from_numpy(values), torch.from_numpy(inputs.T @ inputs)).numpy()
    np.testing.assert_allclose(found.transpose(0, 2, 1) @ found, [np.eye(5)] * 2, atol=1e-12)
    principal = np.linalg.svd(inputs)[2].T
    for basis, each, own in zip(found, values, (3, 1), strict=True):
        expected = np.concatenate([each[:, :own], principal[:, : 5 - own]], 1)
        np.testing.assert_allclose(basis @ (basis.T @ expected), expected, atol=1e-10)


def test_values_of_more_columns_hold_those_of_fewer():
    random = np.random.default_rng(9)
    values, outputs, inputs = (random.normal(size=size) for size in ((3, 6, 2), (3, 2, 7), (1, 30, 6)))
    gram = torch.from_numpy(inputs.transpose(0, 2, 1) @ inputs)
    narrow, wide = (
        merge_values(torch.from_numpy(values), torch.from_numpy(outputs), [(0, 1, 2)], gram, width)[0][0]
        for width in (2, 4)
    )
    within = wide @ torch.linalg.lstsq(wide, narrow).solution
    torch.testing.assert_close(within, narrow, rtol=1e-9, atol=1e-9)


def test_factored_queries_and_keys_are_the_truncated_svd_in_both_metrics():
    random = np.random.default_rng(5)
    queries, keys = random.normal(size=(2, 6, 3)), random.normal(size=(2, 5, 3))
    shares = np.array([0.7, 0.3])
    over_queries, over_keys = random.normal(size=(40, 6)), random.normal(size=(40, 5))
    grams = [torch.from_numpy(inputs.T @ inputs) for inputs in (over_queries, over_keys)]
    logits = over_queries @ np.einsum("h,hcd,hed->ce", shares, queries, keys) @ over_keys.T
    left, sizes, right = np.linalg.svd(logits)
    for width in (3, 8):
        query, key = factor_queries_keys(*map(torch.from_numpy, (queries, keys, shares)), *grams, width)
        assert query.shape == (6, width) and key.shape == (5, width)
        found = over_queries @ (query @ key.T).numpy() @ over_keys.T
        np.testing.assert_allclose(found, (left[:, :width] * sizes[:width]) @ right[:width], atol=1e-9)


def test_movements_are_what_the_output_varies_over_queries_and_the_largest_is_selected():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 4, 7, 7, generator=generator).mul(2).softmax(-1)
    values = torch.randn(2, 4, 7, 3, generator=generator)
    weights = torch.randn(4, 3, 5, generator=generator)
    found = head_movements(maps, values, weights @ weights.mT)
    contributions = (maps.double() @ values.double() @ weights.double()).numpy()  # (B, M, Q, C)
    moved = contributions - contributions.mean(2, keepdims=True)
    np.testing.assert_allclose(found, (moved**2).sum((0, 2, 3)), rtol=1e-5)  # the maps are float32
    counted = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    found = head_movements(maps, values, weights @ weights.mT, counted)
    of_each = [each[:, rows] for each, rows in zip(contributions, counted.numpy(), strict=True)]
    expected = sum(((each - each.mean(1, keepdims=True)) ** 2).sum((1, 2)) for each in of_each)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert select_heads(((0, 1), (2,), (3,)), torch.tensor([1.0, 2.0, 0.1, 0.2])) == (1, 2, 3)


def test_shared_values_merge_to_the_closest_of_their_rank_for_all_that_share_them():
    """Two merged heads on one value: the truncated SVD of their circuits side by side, in the metric of both."""
    random = np.random.default_rng(6)
    values, outputs = random.normal(size=(4, 5, 2)), random.normal(size=(4, 2, 6))
    values[1], values[3] = values[0], values[2]  # two heads to each of two values
    inputs = random.normal(size=(2, 30, 5))
    grams = torch.from_numpy(inputs.transpose(0, 2, 1) @ inputs)
    groups = [(0, 2), (1, 3)]
    merged_values, merged_outputs = merge_values(
        torch.from_numpy(values), torch.from_numpy(outputs), groups, grams, 2, sharing=2
    )
    assert merged_values.shape == (1, 5, 2) and merged_outputs.shape == (2, 2, 6)
    beside = np.concatenate([sum(values[h] @ outputs[h] for h in group) for group in groups], 1)
    both = inputs.reshape(-1, 5)
    left, sizes, right = np.linalg.svd(both @ beside, full_matrices=False)
    found = both @ np.concatenate([(merged_values[0] @ o).numpy() for o in merged_outputs], 1)
    np.testing.assert_allclose(found, (left[:, :2] * sizes[:2]) @ right[:2], atol=1e-9)


def test_values_that_nothing_merges_with_keep_what_they_put_out():
    random = np.random.default_rng(7)
    values, outputs = random.normal(size=(2, 5, 2)), random.normal(size=(2, 2, 6))
    values[1] = values[0]
    gram = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    merged_values, merged_outputs = merge_values(
        torch.from_numpy(values), torch.from_numpy(outputs), [(0,), (1,)], gram, 2, sharing=2
    )
    np.testing.assert_allclose(merged_values[0] @ merged_outputs, values @ outputs, atol=1e-12)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_heads_that_are_dropped_are_those_that_least_squares_misses_least(keep):
    """Brute force, head by head: the one whose absence leaves the least error once all others are refitted."""
    attended, targets, _, outputs = random_case(3)
    attended = attended[:, :, :WIDTH]
    left = list(range(HEADS))
    while len(left) > keep:
        errors = {}
        for head in left:
            features = attended[:, [other for other in left if other != head]].reshape(ROWS, -1)
            errors[head] = ((targets - features @ least_squares(features, targets)) ** 2).sum()
        left.remove(min(errors, key=errors.get))
    assert heads_to_keep(moments_of(attended, targets), outputs, keep, strength=0) == tuple(left)
