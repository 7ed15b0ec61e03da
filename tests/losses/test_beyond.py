"""Matched plans, token grids of different size, memory, and what the loss compares, for the report."""

import pytest
import torch
from blocks_of_records import literal_divergence, pair, record, shd, softmax, squeezed

from shd_diffusion.losses.token_grid import take
from shd_diffusion.operations import Meter
from shd_diffusion.squeezing import plans_from_json, plans_to_json, squeeze_heads

# --- matched plans -------------------------------------------------------------------------------------------


def test_matched_plans_are_calibrated_once_and_kept():
    teacher, student = pair(teacher_heads=6, student_heads=3)
    loss = shd(pairing="matched")
    with pytest.raises(ValueError, match=r"s0.*calibrate"):
        loss(teacher, student)
    plans = loss.calibrate([(teacher, student), pair(teacher_heads=6, student_heads=3, samples=1)])
    assert {name: plan.teacher for name, plan in plans.items()} == {"s0": "t1", "s1": "t3"}
    again = shd(pairing="matched")
    again.plans = plans_from_json(plans_to_json(plans))
    assert again(teacher, student) == loss(teacher, student)
    explicit = shd(pairing=plans["s0"].plan, layer_map={"s0": "t1"})(teacher, student)
    assert explicit == shd(pairing=plans["s0"].plan, layer_map=[1, None])(teacher, student)


def test_calibrating_on_numbers_that_are_not_finite_names_the_block():
    teacher, student = pair(teacher_heads=4, student_heads=2)
    teacher["t3"].value[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"s1.* not finite"):
        shd(pairing="matched").calibrate([(teacher, student)])


# --- grids of different size ---------------------------------------------------------------------------------


def on_coarse_grid(maps, side, ratio, keys=True):
    """Average-pooled queries and keys, rows renormalised, from the definition."""
    samples, heads = maps.shape[:2]
    grid = maps.unflatten(2, (side, side))
    coarse = torch.nn.functional.avg_pool2d(grid.permute(0, 1, 4, 2, 3).flatten(0, 2)[:, None], ratio)
    maps = coarse.reshape(samples, heads, maps.shape[3], -1).mT
    if keys:
        grid = maps.unflatten(3, (side, side))
        coarse = torch.nn.functional.avg_pool2d(grid.flatten(0, 2)[:, None], ratio)
        maps = coarse.reshape(samples, heads, maps.shape[2], -1)
    return maps / maps.sum(-1, keepdim=True)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "mse"])
@pytest.mark.parametrize("chunk_rows", [None, 3])
@pytest.mark.parametrize("finer", ["teacher", "student"])
def test_finer_maps_are_pooled(finer, chunk_rows, divergence):
    fine, coarse = (36, 9)
    teacher = {"t": record(heads=4, queries=fine if finer == "teacher" else coarse)}
    student = {"s": record(heads=2, queries=fine if finer == "student" else coarse, seed=4, learns=True)}
    loss = shd(chunk_rows=chunk_rows, divergence=divergence, temperature=1.5)(teacher, student)
    p, q = squeezed(teacher["t"], 2, 1.5), softmax(student["s"], 1.5)
    p, q = (on_coarse_grid(m, 6, 2) if m.shape[2] == fine else m for m in (p, q))
    expected = literal_divergence(divergence, p, q).mean() * 1.5**2
    torch.testing.assert_close(loss, expected)
    inputs = student["s"].query, student["s"].key
    for found, wanted in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_cross_attention_pools_its_queries_only():
    teacher = {"t": record(heads=4, queries=36, keys=5, kind="cross")}
    student = {"s": record(heads=2, queries=9, keys=5, kind="cross", seed=4, learns=True)}
    p = on_coarse_grid(squeezed(teacher["t"], 2), 6, 2, keys=False)
    expected = literal_divergence("forward_kl", p, softmax(student["s"], 1.0)).mean()
    torch.testing.assert_close(shd()(teacher, student), expected)


def test_rows_of_a_pooled_map_are_sampled_whole():
    teacher, student = (
        {"t": record(heads=2, queries=36)},
        {"s": record(heads=2, queries=9, seed=4, learns=True)},
    )
    values = [shd(rows=1 / 9)(teacher, student, step=step).item() for step in range(60)]
    rows = literal_divergence(
        "forward_kl", on_coarse_grid(softmax(teacher["t"], 1), 6, 2), softmax(student["s"], 1)
    )
    by_row = rows.mean((0, 1)).tolist()
    assert {round(value, 9) for value in values} == {round(value, 9) for value in by_row}


@pytest.mark.parametrize(("fine", "coarse", "kind"), [(36, 16, "self"), (12, 3, "self"), (36, 9, "joint")])
def test_grids_that_do_not_divide_are_an_error(fine, coarse, kind):
    teacher = {"t": record(heads=2, queries=fine, kind=kind)}
    student = {"s": record(heads=2, queries=coarse, kind=kind)}
    with pytest.raises(ValueError, match=f"{fine} and {coarse} tokens"):
        shd()(teacher, student)


@pytest.mark.parametrize("finer", ["teacher", "student"])
@pytest.mark.parametrize("size", [(2, 4), (4, 2), (16, 32)])
def test_grids_of_samples_that_are_not_square(size, finer):
    """Each query and key of the coarse grid against its 2 × 2 tokens, summed one by one."""
    height, width = (4, 8) if size[0] < size[1] else (8, 4)
    teacher = {"t": record(heads=4, queries=32 if finer == "teacher" else 8)}
    student = {"s": record(heads=2, queries=32 if finer == "student" else 8, seed=4, learns=True)}

    def coarse(maps):
        found = torch.zeros(*maps.shape[:2], 8, 8, dtype=maps.dtype)
        for query in range(32):
            for key in range(32):
                row, column = (
                    (token // width // 2) * (width // 2) + token % width // 2 for token in (query, key)
                )
                found[:, :, row, column] += maps[:, :, query, key] / 4
        return found

    p, q = squeezed(teacher["t"], 2), softmax(student["s"], 1.0)
    p, q = (coarse(m) if m.shape[2] == height * width else m for m in (p, q))
    expected = literal_divergence("forward_kl", p, q).mean()
    torch.testing.assert_close(shd()(teacher, student, size=size), expected)
    with pytest.raises(ValueError, match="tokens"):
        shd()(teacher, student)  # as a square it is no grid


# --- memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "row"}, {"merge": "joint"}, {"temperature": 2.0}],
)
def test_memory_grows_no_faster_than_the_tokens(options):
    def most(tokens):  # bytes: all that are held at one time, and those of one tensor
        teacher = {"t": record(samples=1, heads=4, queries=tokens, dtype=torch.float32)}
        student = {"s": record(samples=1, heads=2, queries=tokens, dtype=torch.float32, learns=True)}
        with Meter() as seen:
            shd(chunk_rows=16, **options)(teacher, student).backward()
        return seen.peak, seen.largest

    few, many = most(256), most(1024)
    assert many[0] <= 4 * few[0] and many[1] <= 4 * few[1]
    assert many[1] <= 4 * 4 * 16 * 1024 * (4 if options.get("merge") == "joint" else 1)


# --- inspection ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["sample", "row"])
def test_an_inspection_is_what_the_loss_compares(granularity):
    teacher, student = pair()
    loss = shd(temperature=2.0, granularity=granularity, rows=0.5)
    found = dict(loss.inspect(teacher, student))
    assert list(found) == ["s0", "s1"]
    one = found["s1"]
    torch.testing.assert_close(one.teacher, softmax(teacher["t3"], 2.0))
    torch.testing.assert_close(one.student, softmax(student["s1"], 2.0).detach())
    torch.testing.assert_close(one.squeezed, squeezed(teacher["t3"], 2, 2.0, granularity=granularity))
    expected = literal_divergence("forward_kl", one.squeezed, one.student).mean(-1)
    torch.testing.assert_close(one.divergence, expected)
    whole = shd(temperature=2.0, granularity=granularity)(teacher, student)
    mean = torch.stack([block.divergence.mean() for block in found.values()]).mean() * 4
    torch.testing.assert_close(mean, whole.detach())
    block = teacher["t3"]
    _, details = squeeze_heads(
        softmax(block, 1.0), block.value, block.output_weight, 2, granularity=granularity, return_details=True
    )
    for name in ("coefficients", "weights", "residual"):
        torch.testing.assert_close(getattr(one, name), getattr(details, name))


def test_take_keeps_a_mask_with_its_rows_and_keys():
    mask = torch.randn(2, 1, 9, 9, dtype=torch.float64)
    whole = record(mask=mask)
    rows, keys = torch.tensor([4, 1]), torch.tensor([8, 0, 3])
    part = take(whole, torch.tensor([1]), rows, keys)
    expected = whole.logits()[1:][:, :, rows][..., keys]
    torch.testing.assert_close(part.logits(), expected)
