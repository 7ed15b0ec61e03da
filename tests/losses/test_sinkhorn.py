"""Sinkhorn's divergence of maps and the plan between batches, against loops in float64 and a linear program."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from blocks_of_records import pair, record, shd
from one_term import on_records
from scipy.optimize import linprog

from shd_diffusion.losses.sinkhorn import EPSILON, sinkhorn, transport_plan


def grid_cost(side: int) -> np.ndarray:
    places = [(i / (side - 1), j / (side - 1)) for i in range(side) for j in range(side)]
    return np.array([[(a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 for b in places] for a in places])


def entropic(p: np.ndarray, q: np.ndarray, cost: np.ndarray, epsilon: float = EPSILON) -> float:
    """<π, C> + ε KL(π || p qᵀ), of the plan π that scaling rows and columns in turn converges to."""
    kernel = p[:, None] * np.exp(-cost / epsilon) * q
    u, v = np.ones_like(p), np.ones_like(q)
    for _ in range(3000):
        u = p / (kernel @ v)
        v = q / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    return float((plan * cost).sum() + epsilon * (plan * np.log(plan / np.outer(p, q))).sum())


def divergence(p: np.ndarray, q: np.ndarray, cost: np.ndarray) -> float:
    return entropic(p, q, cost) - (entropic(p, p, cost) + entropic(q, q, cost)) / 2


def maps(rows: int, keys: int, sharpness: float) -> torch.Tensor:
    torch.manual_seed(1)
    return sharpness * torch.randn(2, rows, keys, dtype=torch.float64)


@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_the_divergence_of_rows_is_its_definition(sharpness: float) -> None:
    target, logits = maps(3, 16, sharpness)
    p, q = target.softmax(-1), logits.softmax(-1)
    found, _ = sinkhorn(p, logits.log_softmax(-1))
    cost = grid_cost(4)
    expected = [divergence(a, b, cost) for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=5e-3)


def test_the_gradient_is_the_slope_of_what_the_steps_converge_to() -> None:
    target, logits = (each[0] for each in maps(1, 9, 2.0))
    _, gradient = sinkhorn(target.softmax(-1), logits.log_softmax(-1))
    cost, p = grid_cost(3), target.softmax(-1).numpy()
    slopes = []
    for key in range(9):
        step = torch.zeros(9, dtype=torch.float64)
        step[key] = 1e-4
        ends = [divergence(p, (logits + way * step).softmax(-1).numpy(), cost) for way in (1, -1)]
        slopes.append((ends[0] - ends[1]) / 2e-4)
    np.testing.assert_allclose(gradient.numpy(), slopes, atol=0.02 * np.abs(slopes).max())


def test_it_is_0_of_equal_maps_and_grows_with_the_distance() -> None:
    logits = maps(5, 16, 3.0)[0]
    value, gradient = sinkhorn(logits.softmax(-1), logits.log_softmax(-1))
    assert value.abs().max() < 1e-9 and gradient.abs().max() < 1e-6
    peaks = 9 * torch.eye(16, dtype=torch.float64)
    near, far = (sinkhorn(peaks[0].softmax(-1), peaks[key].log_softmax(-1))[0] for key in (1, 15))
    assert 0 < 5 * near < far  # a KL finds both alike


def test_keys_that_a_mask_hides_are_no_trouble() -> None:
    mask = torch.zeros(2, 1, 1, 9, dtype=torch.float64)
    mask[..., 5:] = -torch.inf
    teacher, student = pair(mask=mask)
    loss = shd(divergence="sinkhorn")(teacher, student)
    loss.backward()
    assert loss.isfinite() and all(one.query.grad.isfinite().all() for one in student.values())


def test_keys_without_a_place_are_refused() -> None:
    for options, says in (({"queries": 12}, "self-attention over 12 keys"), ({"kind": "cross"}, "cross-att")):
        one = {"block": record(**options)}
        with pytest.raises(ValueError, match=rf"block block: `sinkhorn`.*{says}"):
            on_records("shd", one, one, divergence="sinkhorn")


def test_the_plan_between_batches_comes_close_to_the_cheapest() -> None:
    torch.manual_seed(0)
    cost = torch.rand(5, 5, dtype=torch.float64)
    plan = transport_plan(cost, 0.01, steps=500)
    torch.testing.assert_close(plan.sum(0), torch.full((5,), 0.2).double())
    torch.testing.assert_close(plan.sum(1), torch.full((5,), 0.2).double(), rtol=1e-4, atol=0)
    sums = [np.kron(np.eye(5), np.ones(5)), np.kron(np.ones(5), np.eye(5))]
    cheapest = linprog(cost.numpy().ravel(), A_eq=np.vstack(sums), b_eq=np.full(10, 0.2)).fun
    assert (plan * cost).sum().item() == pytest.approx(cheapest, rel=1e-2)
