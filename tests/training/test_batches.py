"""Order and noise follow from (seed, step, sample) and are dealt out, not drawn, by processes."""

from itertools import islice

import pytest
import torch
from scipy import stats

from shd_diffusion.models.mdtv2 import num_kept_tokens
from shd_diffusion.training.batches import (
    BatchLayout,
    NoiseSettings,
    StepSampler,
    draw_noise,
    grouped_step_indices,
    step_indices,
)

PLAIN = NoiseSettings((1, 8, 8), condition_dropout=0.5)


def test_every_epoch_sees_every_image_once() -> None:
    seen = [index for step in range(30) for index in step_indices(3, step, 7, 21)]
    epochs = [seen[start : start + 21] for start in range(0, len(seen), 21)]
    assert all(index // 21 == number for number, epoch in enumerate(epochs) for index in epoch)
    orders = [tuple(index % 21 for index in epoch) for epoch in epochs]
    assert all(sorted(order) == list(range(21)) for order in orders)
    assert len(set(orders)) == len(orders)  # and each in an order of its own


def test_an_epoch_may_end_inside_a_step() -> None:
    assert [i for s in range(7) for i in step_indices(0, s, 3, 7)] == [
        i for s in range(3) for i in step_indices(0, s, 7, 7)
    ]


GROUPS = [
    range(10),
    range(10, 13),
    range(13, 29),
    range(29, 30),
]  # the second and last have too few for a batch of 4


def epochs_of_groups(batch_size: int, seed: int = 2, epochs: int = 3) -> list[list[list[int]]]:
    """The batches of each epoch."""
    per_epoch = sum(max(1, len(group) // batch_size) for group in GROUPS)
    steps = [grouped_step_indices(seed, step, batch_size, GROUPS) for step in range(epochs * per_epoch)]
    return [steps[start : start + per_epoch] for start in range(0, len(steps), per_epoch)]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7])
def test_images_of_several_sizes_come_in_whole_batches_of_one_size(batch_size: int) -> None:
    length = GROUPS[-1].stop
    for number, epoch in enumerate(epochs_of_groups(batch_size)):
        assert all(len(batch) == batch_size for batch in epoch)
        assert all(index // length == number for batch in epoch for index in batch)
        images = [[index % length for index in batch] for batch in epoch]
        assert all(sum(set(batch) <= set(group) for group in GROUPS) == 1 for batch in images)
        for group in GROUPS:
            seen = [image for batch in images for image in batch if image in group]
            if len(group) >= batch_size:  # each at most once; what does not fill a batch waits
                assert len(seen) == len(set(seen)) == len(group) // batch_size * batch_size
            else:  # a batch is filled up, as evenly as it can be
                counts = [seen.count(image) for image in group]
                assert len(seen) == batch_size and max(counts) - min(counts) <= 1


def test_epochs_of_several_sizes_have_orders_of_their_own() -> None:
    first, second, third = epochs_of_groups(3)
    length = GROUPS[-1].stop
    orders = [[[i % length for i in batch] for batch in epoch] for epoch in (first, second, third)]
    assert orders[0] != orders[1] != orders[2] and epochs_of_groups(3) == [first, second, third]
    assert epochs_of_groups(3, seed=3)[0] != first
    waiting = [set(range(length)) - {i for batch in order for i in batch} for order in orders]
    assert all(waiting) and not waiting[0] & waiting[1] & waiting[2]  # others each time
    group_of = [
        [next(n for n, group in enumerate(GROUPS) if batch[0] in group) for batch in o] for o in orders
    ]
    assert all(numbers != sorted(numbers) for numbers in group_of)  # sizes come mixed


def test_one_size_is_dealt_out_as_ever() -> None:
    for step in range(9):
        assert grouped_step_indices(0, step, 4, [range(10)]) == step_indices(0, step, 4, 10)


@pytest.mark.parametrize(("processes", "micro"), [(1, 2), (2, None), (3, 2)])
def test_processes_and_passes_share_a_batch_of_one_size(processes: int, micro: int | None) -> None:
    dealt = layouts(7, processes, micro)
    shares = [list(StepSampler(1, GROUPS, layout, 2, 8)) for layout in dealt]
    for step in range(2, 8):
        passes = slice((step - 2) * dealt[0].num_passes, (step - 1) * dealt[0].num_passes)
        seen = [index for share in shares for part in share[passes] for index in part]
        assert seen == grouped_step_indices(1, step, 7, GROUPS)


def layouts(batch_size: int, processes: int, micro: int | None) -> list[BatchLayout]:
    return [BatchLayout(batch_size, micro, processes, process) for process in range(processes)]


@pytest.mark.parametrize(("batch_size", "processes", "micro"), [
    (8, 1, None), (8, 2, None), (8, 1, 4), (8, 2, 2), (8, 4, 1), (7, 2, None), (10, 3, 2), (9, 4, None), (11, 1, 4),
])  # fmt: skip
def test_any_layout_deals_out_the_same_images(batch_size: int, processes: int, micro: int | None) -> None:
    dealt = layouts(batch_size, processes, micro)
    assert len({layout.num_passes for layout in dealt}) == 1  # sharded models meet in every pass
    assert all(0 < len(places) <= (micro or batch_size) for layout in dealt for places in layout.passes)
    places = [place for layout in dealt for part in layout.passes for place in part]
    assert places == list(range(batch_size))
    shares = [list(StepSampler(1, [range(50)], layout, 0, 5)) for layout in dealt]
    for step in range(5):
        passes = slice(step * dealt[0].num_passes, (step + 1) * dealt[0].num_passes)
        seen = [index for share in shares for part in share[passes] for index in part]
        assert seen == step_indices(1, step, batch_size, 50)


@pytest.mark.parametrize(("batch_size", "processes", "micro"), [(8, 2, 2), (7, 2, None), (10, 3, 2)])
def test_the_shares_of_the_passes_make_the_mean_over_the_batch(
    batch_size: int, processes: int, micro: int | None
) -> None:
    """Processes are averaged, passes are added: so each sample counts 1 / batch_size."""
    values = torch.randn(batch_size, dtype=torch.float64)
    by_process = [
        sum(layout.share(len(part)) * values[list(part)].mean() for part in layout.passes)
        for layout in layouts(batch_size, processes, micro)
    ]
    torch.testing.assert_close(torch.stack(by_process).mean(), values.mean(), rtol=1e-14, atol=0)


def test_too_many_processes_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 images a step are too few for 4 processes"):
        BatchLayout(3, None, 4)


def test_a_resumed_sampler_goes_on_where_the_first_would_have() -> None:
    layout = BatchLayout(8, 4)
    whole = list(StepSampler(5, [range(30)], layout, 0, 10))
    assert list(StepSampler(5, [range(30)], layout, 6, 10)) == list(islice(whole, 12, None))


def test_noise_follows_from_seed_step_and_place() -> None:
    all_of_them, some = draw_noise(0, 4, range(16), PLAIN), draw_noise(0, 4, range(5, 9), PLAIN)
    for name in ("shares", "dropped", "flipped", "noise"):
        assert torch.equal(getattr(all_of_them, name)[5:9], getattr(some, name)), name
    other = draw_noise(0, 5, range(16), PLAIN)
    assert not torch.equal(all_of_them.noise, other.noise)
    assert len({tuple(sample.flatten().tolist()) for sample in all_of_them.noise}) == 16


def test_what_only_some_runs_need_changes_nothing_else() -> None:
    plain = draw_noise(3, 11, range(64), PLAIN)
    more = draw_noise(
        3, 11, range(64), NoiseSettings((1, 8, 8), condition_dropout=0.5, latent_noise=True, tokens=16)
    )
    for name in ("shares", "dropped", "flipped", "noise"):
        assert torch.equal(getattr(plain, name), getattr(more, name)), name
    assert plain.latent_noise is None and plain.token_order is None
    assert more.latent_noise is not None and not torch.equal(more.latent_noise, more.noise)
    assert more.token_order is not None
    assert all(sorted(order) == list(range(16)) for order in more.token_order.tolist())


def test_noise_has_the_distributions_it_should() -> None:
    """Kolmogorov-Smirnov and binomial tests at 0.1 %, of a fixed seed."""
    drawn = draw_noise(0, 0, range(5000), NoiseSettings((4,), condition_dropout=0.1))
    assert stats.kstest(drawn.shares.numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(drawn.noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.binomtest(int(drawn.dropped.sum()), 5000, 0.1).pvalue > 1e-3
    assert stats.binomtest(int(drawn.flipped.sum()), 5000, 0.5).pvalue > 1e-3
    logit = draw_noise(0, 0, range(5000), NoiseSettings((1,), timestep_sampling="logit_normal"))
    assert stats.kstest(torch.logit(logit.shares).numpy(), "norm").pvalue > 1e-3


def test_kept_tokens_are_between_the_ratio_and_a_fifth_less() -> None:
    kept = [num_kept_tokens(16, 0.3, torch.Generator().manual_seed(seed)) for seed in range(200)]
    assert min(kept) >= 8 and max(kept) <= 11 and len(set(kept)) > 2
    for ratio in (-0.1, 0.79):
        with pytest.raises(ValueError, match="mask_ratio"):
            num_kept_tokens(4, ratio, torch.Generator())
