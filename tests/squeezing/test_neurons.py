"""The optimal brain surgeon on neurons, against solving every choice anew (numpy, float64)."""

import numpy as np
import pytest
import torch

from shd_diffusion.squeezing.moments import Moments
from shd_diffusion.squeezing.neurons import remove_neurons

ROWS, NEURONS, CHANNELS = 50, 8, 4


def random_case(seed: int = 0, neurons: int = NEURONS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    activations = random.normal(size=(ROWS + neurons, neurons)) @ random.normal(size=(neurons, neurons))
    weight = random.normal(size=(neurons, CHANNELS))
    targets = activations @ weight + random.normal(size=(len(activations), CHANNELS)) + 3
    return activations, targets, weight


def moments_of(activations: np.ndarray, targets: np.ndarray) -> Moments:
    moments = Moments.zeros(activations.shape[1], targets.shape[1])
    for rows in np.array_split(np.arange(len(activations)), 3):
        moments.add(torch.from_numpy(activations[rows]), torch.from_numpy(targets[rows]))
    return moments


def best_with(kept: list[int], activations, targets, start, penalty) -> tuple[np.ndarray, float]:
    """Weights of the kept neurons at the minimum of |Y - Z W|² + λ |W - W_0|², all of whose removed ones are 0."""
    z, width = activations[:, kept], len(kept)
    rows = np.concatenate([z, np.sqrt(penalty) * np.eye(width)])
    wanted = np.concatenate([targets, np.sqrt(penalty) * start[kept]])
    weight = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    gone = [j for j in range(len(start)) if j not in kept]
    error = ((wanted - rows @ weight) ** 2).sum() + penalty * (start[gone] ** 2).sum()
    return weight, float(error)


@pytest.mark.parametrize("strength", [0.0, 1e-2])
@pytest.mark.parametrize("centre", [False, True])
def test_each_removal_is_the_best_single_one_by_brute_force(strength, centre):
    activations, targets, start = random_case()
    moments = moments_of(activations, targets)
    if centre:
        moments = moments.centred()
        activations, targets = activations - activations.mean(0), targets - targets.mean(0)
    penalty = strength * float((activations**2).sum(0).mean())
    kept = list(range(NEURONS))
    errors = [best_with(kept, activations, targets, start, penalty)[1]]
    while len(kept) > 1:
        candidates = [[j for j in kept if j != gone] for gone in kept]
        kept = min(candidates, key=lambda c: best_with(c, activations, targets, start, penalty)[1])
        weight, error = best_with(kept, activations, targets, start, penalty)
        errors.append(error)
        found, found_weight, objective = remove_neurons(moments, torch.from_numpy(start), len(kept), strength)
        assert found.tolist() == kept
        np.testing.assert_allclose(found_weight, weight, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(objective, errors, rtol=1e-8)
    assert (np.diff(errors) >= 0).all()


def test_many_removals_are_as_exact_as_few():
    neurons = 150  # more removals than are applied together
    activations, targets, start = random_case(1, neurons)
    found, weight, objective = remove_neurons(
        moments_of(activations, targets), torch.from_numpy(start), 10, 0.0
    )
    expected, error = best_with(found.tolist(), activations, targets, start, 0.0)
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    assert objective[-1] == pytest.approx(error, rel=1e-6)
    assert len(objective) == neurons - 10 + 1


def test_the_pair_of_a_copied_neuron_leaves_without_loss():
    activations, targets, start = random_case(2)
    activations[:, 5] = activations[:, 2]
    found, _, objective = remove_neurons(moments_of(activations, targets), torch.from_numpy(start), 7, 1e-8)
    assert set(range(NEURONS)) - set(found.tolist()) <= {2, 5}
    assert objective[1] - objective[0] < 1e-4 * objective[0]


def test_all_neurons_are_the_layer_as_it_is():
    activations, targets, start = random_case()
    found, weight, objective = remove_neurons(
        moments_of(activations, targets), torch.from_numpy(start), NEURONS
    )
    assert found.tolist() == list(range(NEURONS))
    np.testing.assert_array_equal(weight, start)
    assert objective == pytest.approx([((targets - activations @ start) ** 2).sum()])


@pytest.mark.parametrize("keep", [0, 9])
def test_neurons_that_are_not_there_cannot_be_kept(keep):
    with pytest.raises(ValueError, match=f"{keep} of 8 neurons"):
        remove_neurons(moments_of(*random_case()[:2]), torch.from_numpy(random_case()[2]), keep)


@pytest.mark.parametrize("keep", [4, 2])
def test_features_beside_the_neurons_stay_and_are_fitted_with_them(keep):
    """Each removal is the best among the neurons alone, with all weights refitted."""
    activations, targets, start = random_case(3)
    fixed, penalty = 3, 1e-3 * float((activations**2).sum(0).mean())
    left = list(range(NEURONS))
    while len(left) > fixed + keep:
        candidates = [[j for j in left if j != gone] for gone in left if gone >= fixed]
        left = min(candidates, key=lambda c: best_with(c, activations, targets, start, penalty)[1])
    found, weight, objective = remove_neurons(
        moments_of(activations, targets), torch.from_numpy(start), keep, 1e-3, fixed=fixed
    )
    assert found.tolist() == left and found[:fixed].tolist() == [0, 1, 2]
    expected, error = best_with(left, activations, targets, start, penalty)
    np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-8)
    assert objective[-1] == pytest.approx(error, rel=1e-7) and len(objective) == NEURONS - fixed - keep + 1
