"""MiniLMv2's relations against loops over tokens in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from blocks_of_records import pair, record
from one_term import on_records

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.operations import Meter
from shd_diffusion.squeezing import map_stream


def relations(vectors: torch.Tensor, heads: int) -> np.ndarray:
    """softmax(X Xᵀ / √d_r) by sample, relation head and token, of (B, H, N, d)."""
    samples, _, tokens, _ = vectors.shape
    found = np.zeros((samples, heads, tokens, tokens))
    for b in range(samples):
        wide = [np.concatenate([head[n] for head in vectors[b].detach().numpy()]) for n in range(tokens)]
        for a in range(heads):
            cut = [np.split(vector, heads)[a] for vector in wide]
            for n in range(tokens):
                logits = np.array([cut[n] @ other for other in cut]) / np.sqrt(len(cut[n]))
                weights = np.exp(logits - logits.max())
                found[b, a, n] = weights / weights.sum()
    return found


def literal(teacher: AttentionRecord, student: AttentionRecord, names: list[str], heads: int) -> float:
    total = 0.0
    for name in names:
        p, q = (relations(getattr(one, name), heads) for one in (teacher, student))
        total += (p * np.log(p / q)).sum(-1).mean()
    return total


@pytest.mark.parametrize(
    ("options", "names", "heads"),
    [
        ({}, ["query", "key", "value"], 4),  # widths 20 and 8, and 5 heads
        ({"relation_heads": 2}, ["query", "key", "value"], 2),
        ({"relations": ["value"], "relation_heads": 1}, ["value"], 1),
    ],
)
def test_the_loss_is_its_definition(options: dict[str, Any], names: list[str], heads: int) -> None:
    teacher, student = pair()
    term, outputs = on_records("minilm", teacher, student, **options)
    expected = np.mean([literal(teacher[by], student[own], names, heads) for own, by in term.pairs.items()])
    assert list(term.pairs.items()) == [("s0", "t1"), ("s1", "t3")]
    assert term(outputs).item() == pytest.approx(expected, rel=1e-10)
    assert list(term.parameters()) == []


def test_gradients_reach_queries_keys_and_values() -> None:
    teacher, student = pair(blocks=1, teacher_heads=2)
    term, outputs = on_records("minilm", teacher, student)
    inputs = [getattr(student["s0"], name) for name in ("query", "key", "value")]
    found = torch.autograd.grad(term(outputs), inputs)
    for name, tensor, gradient in zip(("query", "key", "value"), inputs, found, strict=True):
        step = torch.zeros_like(tensor)
        step[1, 1, 4, 2] = 1e-6

        def moved(by: torch.Tensor, name: str = name, tensor: torch.Tensor = tensor) -> float:
            other = {"s0": replace(student["s0"], **{name: (tensor + by).detach()})}
            return term(replace(outputs, student=replace(outputs.student, records=other))).item()

        slope = (moved(step) - moved(-step)) / 2e-6
        assert gradient[1, 1, 4, 2].item() == pytest.approx(slope, rel=1e-5)


def test_itself_is_no_way_off() -> None:
    own = record(heads=3, learns=True)
    term, outputs = on_records("minilm", {"t": own}, {"s": own})
    assert term(outputs).item() == pytest.approx(0, abs=1e-12)


def test_cross_attention_has_relations_among_its_tokens_and_among_its_text() -> None:
    teacher = record(heads=4, queries=9, keys=5, kind="cross")
    student = record(heads=2, queries=9, keys=5, seed=4, kind="cross")
    term, outputs = on_records("minilm", {"t": teacher}, {"s": student}, relation_heads=4)
    expected = literal(teacher, student, ["query", "key", "value"], 4)
    assert term(outputs).item() == pytest.approx(expected, rel=1e-10)


def test_hidden_keys_are_no_part_of_it() -> None:
    """Of five tokens of text the second sample has three."""
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    mask[1, ..., 3:] = -torch.inf
    teacher = record(heads=4, queries=9, keys=5, kind="cross", mask=mask.clamp_min(-1e30))
    student = record(heads=2, queries=9, keys=5, seed=4, kind="cross", mask=mask.clamp_min(-1e30))
    term, outputs = on_records("minilm", {"t": teacher}, {"s": student}, relations=["key"])
    expected = []
    for sample, length in ((0, 5), (1, 3)):
        parts = [replace(one, key=one.key[sample : sample + 1, :, :length]) for one in (teacher, student)]
        expected.append(literal(*parts, ["key"], 4))
    assert term(outputs).item() == pytest.approx(np.mean(expected), rel=1e-10)


def test_a_finer_grid_is_pooled() -> None:
    teacher, student = record(heads=4, queries=36), record(heads=2, queries=9, seed=4)
    term, outputs = on_records("minilm", {"t": teacher}, {"s": student}, relations=["query"])
    fine, q = relations(teacher.query, 4), relations(student.query, 4)
    p = np.zeros_like(q)
    for row in range(36):
        for column in range(36):
            places = [(token // 6 // 2) * 3 + token % 6 // 2 for token in (row, column)]
            p[:, :, places[0], places[1]] += fine[:, :, row, column] / 4
    assert term(outputs).item() == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-10)


def test_relations_never_exist_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(map_stream._AT_ONCE, "cpu", 2**16)
    teacher = {"t": record(samples=1, heads=8, queries=512, dtype=torch.float32)}
    student = {"s": record(samples=1, heads=8, queries=512, seed=1, dtype=torch.float32, learns=True)}
    term, outputs = on_records("minilm", teacher, student, relations=["value"])
    with Meter() as seen:
        term(outputs).backward()
    assert seen.largest <= 4 * 2**16 < 8 * 512**2 * 4  # bytes of one tensor; of all relations


def test_heads_that_do_not_divide_the_widths() -> None:
    teacher, student = pair()
    with pytest.raises(ValueError, match=r"3 relation heads do not divide .* 20 and 8 .* a divisor of 4"):
        on_records("minilm", teacher, student, relation_heads=3)
