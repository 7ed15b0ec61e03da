"""Order and draws follow from (seed, step) and are dealt out, not drawn, by processes."""

from itertools import islice

import pytest
import torch

from shd_diffusion.training.data_order import Layout, StepSampler, step_indices
from shd_diffusion.training.draws import draw


def test_every_epoch_sees_every_image_once() -> None:
    seen = [index for step in range(30) for index in step_indices(3, step, 7, 21)]
    epochs = [seen[start : start + 21] for start in range(0, len(seen), 21)]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)  # and each in an order of its own


def test_an_epoch_may_end_inside_a_step() -> None:
    assert [i for s in range(7) for i in step_indices(0, s, 3, 7)] == [
        i for s in range(3) for i in step_indices(0, s, 7, 7)
    ]


@pytest.mark.parametrize(
    "layouts",
    [
        [Layout(8)],
        [Layout(4, processes=2, process=p) for p in range(2)],
        [Layout(4, accumulation=2)],
        [Layout(2, accumulation=2, processes=2, process=p) for p in range(2)],
    ],
)
def test_any_layout_deals_out_the_same_images(layouts: list[Layout]) -> None:
    shares = [list(StepSampler(1, 50, layout, 0, 5)) for layout in layouts]
    for step in range(5):
        dealt = [
            index
            for micro in range(layouts[0].accumulation)
            for share in shares
            for index in share[step * layouts[0].accumulation + micro]
        ]
        assert dealt == step_indices(1, step, 8, 50)


def test_a_resumed_sampler_goes_on_where_the_first_would_have() -> None:
    layout = Layout(4, accumulation=2)
    whole = list(StepSampler(5, 30, layout, 0, 10))
    assert list(StepSampler(5, 30, layout, 6, 10)) == list(islice(whole, 12, None))


def test_draws_follow_from_seed_and_step() -> None:
    first, again = (draw(0, 4, 16, (1, 8, 8), 1000, 0.5) for _ in range(2))
    other = draw(0, 5, 16, (1, 8, 8), 1000, 0.5)
    assert torch.equal(first.noise, again.noise) and torch.equal(first.timesteps, again.timesteps)
    assert torch.equal(first.dropped, again.dropped)
    assert not torch.equal(first.noise, other.noise)


def test_draws_have_the_distributions_they_should() -> None:
    drawn = draw(0, 0, 20000, (4,), 1000, 0.1)
    assert abs(drawn.noise.mean()) < 0.02 and abs(drawn.noise.std() - 1) < 0.02
    assert drawn.timesteps.min() == 0 and drawn.timesteps.max() == 999
    assert abs(drawn.timesteps.double().mean() - 499.5) < 8
    assert abs(drawn.dropped.double().mean() - 0.1) < 0.01
