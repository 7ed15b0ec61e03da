"""Padded text: what a loss finds in a batch of a short and a long sample is the mean of what it finds in each alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from blocks_of_records import record, shd
from one_term import on_records
from torch import Tensor

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.attention.kernels import MASKED
from shd_diffusion.losses import TERMS
from shd_diffusion.losses.divergence import DIVERGENCES
from shd_diffusion.losses.padding import row_share, with_text_mask
from shd_diffusion.losses.term import Batch, Captured, StepOutputs
from shd_diffusion.models.families import TEXT_MASK
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.trace import Trace

TOKENS, SHORT = 9, 6
COUNTED = torch.arange(TOKENS) < torch.tensor([SHORT, TOKENS])[:, None]
MASK = torch.zeros(2, 1, 1, TOKENS).masked_fill(~COUNTED[:, None, None], MASKED)


def padded(heads: int, seed: int, learns: bool = False) -> AttentionRecord:
    """Of text and image at once; the first sample's text is short."""
    made = record(heads=heads, queries=TOKENS, seed=seed, learns=learns, mask=MASK, kind="self")
    return replace(made, counted=COUNTED)


def alone(of: AttentionRecord, sample: int) -> AttentionRecord:
    """One sample without its padding."""
    tokens = slice(int(COUNTED[sample].sum()))
    query, key, value = (part[sample : sample + 1, :, tokens] for part in (of.query, of.key, of.value))
    return replace(of, query=query, key=key, value=value, mask=None, counted=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_counted_exactly_in_half_precision(dtype: torch.dtype) -> None:
    """257 rows are no number of bfloat16, and 70,000 none of float16."""
    for rows in (257, 70_000):
        half = replace(padded(1, 0), query=torch.zeros(2, 1, rows, 1, dtype=dtype), counted=None)
        assert (row_share(half, 1, torch.float32) * rows).tolist() == pytest.approx([1.0, 1.0], rel=1e-6)


def gradients(value: Tensor, of: AttentionRecord) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, (of.query, of.key))


STRATEGIES: list[dict[str, Any]] = [
    *({"divergence": name} for name in DIVERGENCES if name != "sinkhorn"),
    {"granularity": "row"},
    {"merge": "joint"},
    {"temperature": 2.0},
    {"chunk_rows": 2},
]


@pytest.mark.parametrize("options", STRATEGIES, ids=str)
def test_shd_of_a_padded_sample_is_that_of_its_tokens(options: dict[str, Any]) -> None:
    teacher, student, loss = padded(5, 1), padded(2, 2, learns=True), shd(**options)
    both = loss({"block": teacher}, {"block": student})
    each = [loss({"block": alone(teacher, i)}, {"block": alone(student, i)}) for i in range(2)]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2, rtol=1e-12, atol=0)
    for found, expected in zip(
        gradients(both, student), gradients((each[0] + each[1]) / 2, student), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_what_padded_rows_hold_changes_nothing() -> None:
    teacher, student, loss = padded(5, 1), padded(2, 2), shd()
    expected = loss({"block": teacher}, {"block": student})
    other = teacher.query.masked_fill(~COUNTED[:, None, :, None], 7.0)
    assert torch.equal(loss({"block": replace(teacher, query=other)}, {"block": student}), expected)
    found = dict(loss.inspect({"block": teacher}, {"block": student}))["block"].divergence
    torch.testing.assert_close(found.mean(), expected, rtol=1e-12, atol=0)


def test_what_counts_for_one_model_alone_does_not_count() -> None:
    teacher, student, loss = padded(5, 1), padded(2, 2), shd()
    expected = loss({"block": teacher}, {"block": student})
    assert torch.equal(loss({"block": replace(teacher, counted=None)}, {"block": student}), expected)
    assert torch.equal(loss({"block": teacher}, {"block": replace(student, counted=None)}), expected)


@pytest.mark.parametrize(
    ("name", "options", "heads"),
    [
        ("attention_mse", {"heads": "average"}, 2),
        ("attention_mse", {"heads": "equal"}, 5),
        ("aligner", {}, 2),
        ("minilm", {}, 2),
    ],
)
def test_other_terms_leave_padding_out(name: str, options: dict[str, Any], heads: int) -> None:
    def trace(of: AttentionRecord) -> Trace:
        return Trace((1, 4, 4), {"block": of}, torch.zeros(1, 1, 4, 4))

    teacher, student = padded(5, 1), padded(heads, 2, learns=True)
    kind = TERMS[name]
    term = kind(
        kind.Config.model_validate({"weight": 1.0, **options}), trace(student), trace(teacher)
    ).double()
    process = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))
    images = torch.zeros(1, 1, 4, 4)
    batch = Batch(images, images, images, torch.zeros(1), {})

    def of(teacher: AttentionRecord, student: AttentionRecord) -> Tensor:
        both = Captured({"block": student}), Captured({"block": teacher})
        return term(StepOutputs(process, batch, images, images, *both))

    found = of(teacher, student)
    expected = (of(alone(teacher, 0), alone(student, 0)) + of(alone(teacher, 1), alone(student, 1))) / 2
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def rows_and_keys(joint: AttentionRecord, text_first: bool) -> dict[str, AttentionRecord]:
    """A joint block of three image and six text tokens as its two records, and one of a single stream."""
    image, text = (slice(6, 9), slice(0, 6)) if text_first else (slice(0, 3), slice(3, 9))
    streams = {"": image, ":context": text}
    records = {
        f"blocks.0.attn{suffix}": replace(
            joint, name=f"blocks.0.attn{suffix}", query=joint.query[:, :, own], own_keys=own
        )
        for suffix, own in streams.items()
    }
    single = replace(joint, name="single_blocks.0.attn", kind="self", own_keys=None)
    return records | {"single_blocks.0.attn": single}


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("shd", {}), ("attention_mse", {}), ("aligner", {})),
        *(("minilm", {"relations": [relation]}) for relation in ("query", "key", "value")),
    ],
    ids=str,
)  # fmt: skip
def test_what_padded_text_holds_changes_nothing_where_a_model_attends_to_it(
    name: str, options: dict[str, Any], text_first: bool
) -> None:
    """The student's own queries of padding; its keys and values too where these are what is compared."""
    condition = {TEXT_MASK: torch.arange(6) < torch.tensor([4, 6])[:, None]}
    change = options.get("relations", ["query"])[0]
    teacher, student = (record(heads=h, queries=9, kind="joint", seed=h) for h in (4, 2))
    other = getattr(student, change).clone()
    for padding in [(0, 4), (0, 5)] if text_first else [(0, 7), (0, 8)]:
        other[padding[0], :, padding[1]] += 5.0
    values = []
    for one in (student, replace(student, **{change: other})):
        both = [with_text_mask(rows_and_keys(each, text_first), condition) for each in (teacher, one)]
        if not text_first:  # models of a single stream put text first
            both = [{n: r for n, r in each.items() if not n.startswith("single")} for each in both]
        term, outputs = on_records(name, *both, **options)
        values.append(term(replace(outputs, batch=replace(outputs.batch, condition=condition))).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert values[0] > 0


@pytest.mark.parametrize("real", [1, 3, 9])
def test_some_rows_estimate_all_of_them_whatever_the_padding(real: int) -> None:
    """The mean over all draws of three of nine rows, each as likely as the others, is the loss on all rows."""
    counted = (torch.arange(TOKENS) < real).expand(2, -1)
    teacher, student = (replace(record(heads=h, queries=TOKENS, seed=h), counted=counted) for h in (4, 2))
    full = shd()({"block": teacher}, {"block": student}).item()
    loss = shd(rows=1 / 3)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for rows in itertools.combinations(range(TOKENS), 3):
            patch.setattr("shd_diffusion.losses.shd.sample_rows", lambda *_, rows=rows: torch.tensor(rows))
            found.append(loss({"block": teacher}, {"block": student}).item())
    assert np.mean(found) == pytest.approx(full, rel=1e-12)


def test_padded_text_that_a_model_attends_to_does_not_count_either() -> None:
    """Text of six tokens beside an image of three, of which the condition tells the padding."""
    mask = torch.arange(6) < torch.tensor([4, 6])[:, None]
    made = {
        "blocks.0.attn": record(queries=3, keys=9, kind="joint"),
        "blocks.0.attn:context": record(queries=6, keys=9, kind="joint"),
        "blocks.0.attn2": record(queries=9, kind="self"),
        "single_blocks.0.attn": record(queries=9, kind="self"),
    }
    found = {name: of.counted for name, of in with_text_mask(made, {TEXT_MASK: mask}).items()}
    assert found["blocks.0.attn"] is None and found["blocks.0.attn2"] is None
    assert torch.equal(found["blocks.0.attn:context"], mask)
    assert torch.equal(found["single_blocks.0.attn"], torch.cat([mask, mask.new_ones(2, 3)], 1))
    assert all(of.counted is None for of in with_text_mask(made, {}).values())
