"""The loss against its definition with whole maps in float64, by value and by gradient."""

import itertools
import os
import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from blocks_of_records import literal_divergence, pair, record, shd, softmax, squeezed

from shd_diffusion.losses import token_grid
from shd_diffusion.losses.divergence import DIVERGENCES, forward_kl, forward_kl_of_logits
from shd_diffusion.losses.map_divergence import map_divergence
from shd_diffusion.squeezing import map_stream


@dataclass
class InChunks:
    """Maps in chunks of one sample and two rows."""

    maps: torch.Tensor

    def chunks(self):
        samples, _, rows, _ = self.maps.shape
        parts = [(slice(b, b + 1), slice(r, r + 2)) for b in range(samples) for r in range(0, rows, 2)]
        return [((some, part), self.maps[some, :, part]) for some, part in parts]


BLOCKS = {"s0": "t1", "s1": "t3"}
BY_ENTRY = [name for name in DIVERGENCES if name != "sinkhorn"]  # which has a file of its own


def literal(teacher, student, divergence="forward_kl", temperature=1.0, **strategy):
    terms = [
        literal_divergence(
            divergence,
            squeezed(teacher[theirs], student[ours].heads, temperature, **strategy),
            softmax(student[ours], temperature),
        ).mean()
        for ours, theirs in BLOCKS.items()
    ]
    return torch.stack(terms).mean() * temperature**2


def gradients(loss, student):
    inputs = [tensor for block in student.values() for tensor in (block.query, block.key)]
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def assert_equal(loss, expected, student, **tolerance):
    torch.testing.assert_close(loss, expected.to(loss.dtype), **tolerance)
    for found, wanted in zip(gradients(loss, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("divergence", BY_ENTRY)
def test_every_divergence_equals_its_definition(divergence, temperature):
    teacher, student = pair()
    loss = shd(divergence=divergence, temperature=temperature)(teacher, student)
    assert_equal(loss, literal(teacher, student, divergence, temperature), student)


@pytest.mark.parametrize(
    "strategy",
    [
        {"granularity": "row"},
        {"merge": "joint"},
        {"merge": "joint", "granularity": "row"},
        {"coefficient": "mean"},
        {"coefficient": "select"},
        {"pairing": (((0, 4), (3, 1), (2,)), ((0, 2), (1,)))},
    ],
)
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_every_strategy_equals_its_definition(strategy, chunk_rows):
    teacher, student = pair()
    loss = shd(temperature=2.0, chunk_rows=chunk_rows, **strategy)(teacher, student)
    assert_equal(loss, literal(teacher, student, temperature=2.0, **strategy), student)


@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"merge": "joint"}, {"temperature": 3.0}])
@pytest.mark.parametrize("chunk_rows", [1, 2, 4, 5, 9, 18, 1000])
def test_the_chunk_does_not_change_the_value(options, chunk_rows):
    teacher, student = pair(teacher_heads=7, samples=3)
    whole = shd(**options)(teacher, student)
    assert_equal(shd(chunk_rows=chunk_rows, **options)(teacher, student), whole, student)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "row"},
        {"merge": "joint"},
        {"temperature": 3.0},
        {"rows": 0.5},
    ],
)
@pytest.mark.parametrize("at_once", [7 * 9 * 9, 7 * 4 * 9], ids=["one sample", "four of its nine rows"])
def test_samples_that_are_squeezed_together_may_take_several_chunks(options, at_once, monkeypatch):
    mask = torch.zeros(3, 1, 1, 9, dtype=torch.float64)
    mask[1, ..., 5:] = mask[2, ..., :2] = -torch.inf
    teacher, student = pair(teacher_heads=7, samples=3, mask=mask)
    at_one_go = shd(**options)(teacher, student)
    monkeypatch.setitem(map_stream._AT_ONCE, "cpu", at_once)
    assert_equal(shd(**options)(teacher, student), at_one_go, student)


@pytest.mark.parametrize("divergence", [name for name in BY_ENTRY if name != "adaptive_kl"])
@pytest.mark.parametrize("pool", [(1, 1), (4, 4)])
def test_gradcheck(divergence, pool):
    student = record(samples=3, heads=2, queries=4 * pool[0], keys=4 * pool[1], learns=True)
    targets = torch.randn(3, 2, 4, 4, dtype=torch.float64).softmax(-1)
    samples = [(some, InChunks(targets[some])) for some in (slice(0, 2), slice(2, 3))]

    def divergences(query, key):
        moved = replace(student, query=query, key=key)
        return map_divergence(moved, samples, DIVERGENCES[divergence], 1.5, pool)

    # of pooled maps in one random direction instead of each: of whole maps each is checked, in a tenth of the time
    of = student.query, student.key
    assert torch.autograd.gradcheck(divergences, of, fast_mode=pool != (1, 1))


def test_equal_heads_are_plain_attention_transfer():
    teacher, student = pair(teacher_heads=3, student_heads=3)
    expected = torch.stack([
        literal_divergence("forward_kl", softmax(teacher[theirs], 1.0), softmax(student[ours], 1.0)).mean()
        for ours, theirs in BLOCKS.items()
    ]).mean()  # fmt: skip
    assert_equal(shd()(teacher, student), expected, student)


def test_a_student_that_has_the_squeezed_maps_has_no_loss():
    teacher = {"t": record(heads=4)}
    teacher["t"] = replace(teacher["t"], query=teacher["t"].query[:, :1].expand(-1, 4, -1, -1))
    teacher["t"] = replace(teacher["t"], key=teacher["t"].key[:, :1].expand(-1, 4, -1, -1))
    student = {
        "s": replace(
            teacher["t"],
            query=teacher["t"].query[:, :2].clone().requires_grad_(),
            key=teacher["t"].key[:, :2],
        )
    }
    loss = shd()(teacher, student)
    assert loss.item() == pytest.approx(0, abs=1e-14)
    assert torch.autograd.grad(loss, student["s"].query)[0].abs().max() < 1e-12


def test_the_gradient_stays_with_the_student():
    teacher, student = pair()
    teacher = {name: replace(block, query=block.query.requires_grad_()) for name, block in teacher.items()}
    shd()(teacher, student).backward()
    assert all(block.query.grad is None and block.key.grad is None for block in teacher.values())
    assert all(
        block.query.grad.abs().sum() > 0 and block.key.grad.abs().sum() > 0 for block in student.values()
    )
    assert all(block.value.grad is None for block in student.values())


@pytest.mark.parametrize("shape", [(1, 1, 1, 9), (2, 1, 1, 9), (2, 1, 9, 9)])
@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min, -2.0])
@pytest.mark.parametrize("divergence", BY_ENTRY)
def test_masks(shape, low, divergence):
    generator = torch.Generator().manual_seed(3)
    mask = torch.where(torch.rand(shape, generator=generator) < 0.4, low, 0.0).double()
    mask[..., 0] = 0.0
    teacher, student = pair(mask=mask)
    loss = shd(divergence=divergence, chunk_rows=4, temperature=2.0)(teacher, student)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, student))
    if low == -2.0:
        assert_equal(loss, literal(teacher, student, divergence, 2.0), student)
    elif divergence == "forward_kl":
        hidden = student["s0"].query.grad_fn is None and mask.expand(2, 1, 9, 9) < -1e30
        kept = softmax(student["s0"], 2.0).masked_fill(hidden, 0)
        torch.testing.assert_close(kept.sum(-1), torch.ones_like(kept[..., 0]))
        expected = []
        for ours, theirs in BLOCKS.items():
            p, q = squeezed(teacher[theirs], 2, 2.0), softmax(student[ours], 2.0)
            expected.append(
                torch.where(p > 0, p * (p.clamp_min(1e-300) / q.clamp_min(1e-300)).log(), 0.0).sum(-1).mean()
            )
        torch.testing.assert_close(loss, torch.stack(expected).mean() * 4)


@pytest.mark.parametrize("shape", [(1, 2, 9, 9), (2, 2, 9, 9), (1, 1, 9, 9), (1, 2, 1, 9)])
@pytest.mark.parametrize("options", [{}, {"chunk_rows": 4}, {"rows": 0.5}])
def test_the_gradient_reaches_a_learned_mask(shape, options):
    """Such as MDTv2's position bias: without it the maps of its blocks are not all that is learned."""
    teacher, student = pair()
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    student = {name: replace(block, mask=bias.clone().requires_grad_()) for name, block in student.items()}
    found = torch.autograd.grad(shd(**options)(teacher, student), [block.mask for block in student.values()])
    if not options.get("rows"):
        wanted = torch.autograd.grad(literal(teacher, student), [block.mask for block in student.values()])
        for gradient, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(gradient, expected)
    assert all(gradient.abs().sum() > 0 for gradient in found)


@pytest.mark.parametrize(
    ("granularity", "coefficient_rows"), [("sample", "all"), ("row", "all"), ("row", "sampled")]
)
def test_sampled_rows_estimate_the_loss_without_bias(monkeypatch, granularity, coefficient_rows):
    teacher, student = pair(queries=6)
    options = {"granularity": granularity, "coefficient_rows": coefficient_rows}
    subsets = list(itertools.combinations(range(6), 2))
    total = 0.0
    for subset in subsets:
        monkeypatch.setattr("shd_diffusion.losses.shd.sample_rows", lambda *_, s=subset: torch.tensor(s))
        total = total + shd(rows=1 / 3, **options)(teacher, student)
    monkeypatch.undo()
    assert_equal(total / len(subsets), shd(granularity=granularity)(teacher, student), student)


def test_rows_are_drawn_by_step_and_evenly():
    draws = [token_grid.sample_rows(8, 0.25, 7, step, "block") for step in range(4000)]
    assert all(len(set(rows.tolist())) == 2 for rows in draws)
    counts = torch.bincount(torch.cat(draws), minlength=8).double()
    assert ((counts - 1000).square() / 1000).sum() < 24.3  # chi-squared, 7 degrees of freedom, 0.1 %
    assert torch.equal(token_grid.sample_rows(8, 0.25, 7, 5, "block"), draws[5])
    assert token_grid.sample_rows(8, 1.0, 7, 5, "block") is None
    assert len(token_grid.sample_rows(8, 0.01, 7, 5, "block")) == 1
    teacher, student = pair()
    loss = shd(rows=0.5, seed=1)
    assert loss(teacher, student, step=3) == loss(teacher, student, step=3)
    assert loss(teacher, student, step=3) != loss(teacher, student, step=4)


def test_samples_outside_the_timesteps_add_nothing():
    teacher, student = pair(samples=4)
    timesteps = torch.tensor([10, 500, 200, 900])
    limited = shd(timesteps=[200, 800])(teacher, student, timesteps=timesteps)

    def inside(records):
        return {name: token_grid.take(block, torch.tensor([1, 2])) for name, block in records.items()}

    assert_equal(limited, shd()(inside(teacher), inside(student)) / 2, student)
    none = shd(timesteps=[901, 999])(teacher, student, timesteps=timesteps)
    assert none == 0
    assert all((gradient == 0).all() for gradient in gradients(none, student))
    with pytest.raises(ValueError, match="timesteps"):
        shd(timesteps=[0, 1])(teacher, student)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    teacher, student = pair(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = shd()(teacher, student)
    assert loss.dtype == torch.float32
    expected = literal(teacher, student)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    for found, wanted in zip(gradients(loss, student), gradients(expected, student), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("of", ["query", "key", "value"])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_numbers_that_are_not_finite_name_the_block(who, of):
    teacher, student = pair()
    if (who, of) == ("student", "value"):
        return  # the student's values take no part
    records, name = (teacher, "t3") if who == "teacher" else (student, "s1")
    broken = getattr(records[name], of).detach().clone()
    broken[0, 0, 0, 0] = torch.nan
    records[name] = replace(records[name], **{of: broken})
    with pytest.raises(ValueError, match=r"s1 .*t3.* not finite"):
        shd()(teacher, student)


@pytest.mark.parametrize("rows", [0.5, 1.0])
def test_under_torch_compile(rows):
    teacher, student = pair()
    loss = shd(rows=rows)
    compiled = torch.compile(lambda t, s: loss(t, s), backend="eager")
    assert_equal(compiled(teacher, student), loss(teacher, student), student)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile takes a C++ compiler on a CPU")
@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="torch 2.14's code generator writes at::vec without declaring it where it may use no vector instructions",
)
def test_compiled_by_itself():
    teacher, student = pair(blocks=1)
    found = shd(compile=True, rows=0.5)(teacher, student)
    assert_equal(found, shd(rows=0.5)(teacher, student), student)


def test_a_weight_that_changes_is_seen():
    teacher, student = pair(blocks=1)
    loss = shd()
    before = loss(teacher, student)
    with torch.no_grad():
        for block in teacher.values():
            block.output_weight[:, : block.output_weight.shape[1] // 5] *= 10
    after = loss(teacher, student)
    assert after != before
    torch.testing.assert_close(after, shd()(teacher, student))


def test_heads_that_cannot_be_squeezed_name_both_counts():
    teacher, student = pair(teacher_heads=2, student_heads=3)
    with pytest.raises(ValueError, match=r"2 .* 3"):
        shd()(teacher, student)


@pytest.mark.parametrize("offset", [0.0, 80.0])
def test_forward_kl_has_the_same_from_logits(offset):
    """In float32 against the log of the maps in float64; logits of any offset and spread."""
    generator = torch.Generator().manual_seed(5)
    logits = 8 * torch.randn(2, 3, 5, 33, generator=generator) + offset
    target = (4 * torch.randn(2, 3, 5, 33, generator=generator)).double().softmax(-1)
    value, gradient = forward_kl(target, logits.double().log_softmax(-1))
    found, slope = forward_kl_of_logits(target.float(), logits.clone())
    torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope.double(), gradient, rtol=1e-5, atol=1e-6)
    exact, _ = forward_kl_of_logits(target, logits.double())
    torch.testing.assert_close(exact, value, rtol=1e-12, atol=1e-12)
