"""SHD and the other mapped terms on chosen attention: by kind, stream and depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from blocks_of_records import record, shd
from diffusers import SD3Transformer2DModel
from torch import Tensor

from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.losses import TERMS
from shd_diffusion.losses.choice import choose_pairs
from shd_diffusion.models.denoiser import predict
from shd_diffusion.models.trace import Trace, trace

KINDS = {
    "a.attn": "joint", "a.attn:context": "joint", "a.attn2": "self", "b.attn": "joint", "b.attn:context": "joint",
    "b.cross": "cross", "c.attn": "joint", "d.attn": "self", "e.attn": "self",
}  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "left_out"),
    [
        ({}, []),
        ({"kinds": ["joint"]}, ["a.attn2", "b.cross", "d.attn", "e.attn"]),
        ({"kinds": ["cross", "self"]}, ["a.attn", "a.attn:context", "b.attn", "b.attn:context", "c.attn"]),
        ({"streams": ["image"]}, ["a.attn:context", "b.attn:context"]),
        ({"streams": ["text"]}, ["a.attn", "b.attn", "c.attn"]),
        ({"streams": ["text", "image"]}, []),
        (
            {"after": 0.5},
            ["a.attn", "a.attn:context", "a.attn2", "b.attn", "b.attn:context"],
        ),  # 3 of 7 modules
        ({"after": 0.5, "kinds": ["self"]}, [*KINDS.keys() - {"d.attn", "e.attn"}]),  # 1 of 3
        ({"after": 0.99}, [*KINDS.keys() - {"e.attn"}]),
        (
            {"after": 0.5, "streams": ["text"], "kinds": ["joint"]},
            [*KINDS.keys() - {"b.attn:context"}],
        ),
    ],
)
def test_what_is_chosen(choice: dict[str, Any], left_out: list[str]) -> None:
    pairs = choose_pairs(KINDS, KINDS, **choice)
    assert pairs == {name: name for name in KINDS if name not in left_out}
    assert list(pairs) == [name for name in KINDS if name not in left_out]  # in order of depth


def test_a_share_is_counted_in_whole_blocks() -> None:
    blocks = {f"b{i}": "self" for i in range(100)}
    assert len(choose_pairs(blocks, blocks, after=0.29)) == 71
    turned = {f"b{i}": f"b{i}" for i in reversed(range(100))}
    assert list(choose_pairs(blocks, blocks, turned, after=0.75)) == [f"b{i}" for i in range(75, 100)]


def test_without_a_choice_the_kinds_of_both_models_count() -> None:
    student, teacher = {"s0": "self", "s1": "cross"}, {"t0": "self", "t1": "self", "t2": "joint"}
    assert choose_pairs(teacher, student) == {"s0": "t1"}


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            {"kinds": ["self", "cross"]},
            r"`kinds` names cross-attention, of which the teacher has none .*self and joint$",
        ),
        (
            {"kinds": ["joint"]},
            r"`kinds` names joint-attention, of which the student has none .* has self and cross$",
        ),
        ({"streams": ["text"]}, r"^`streams` names text, but no joint attention of both models"),
        ({"layer_map": [None]}, "the layer map is empty"),
    ],
)
def test_what_cannot_be_chosen_is_said(choice: dict[str, Any], message: str) -> None:
    student, teacher = {"s0": "self", "s1": "cross"}, {"t0": "self", "t2": "joint"}
    with pytest.raises(ValueError, match=message):
        choose_pairs(teacher, student, **choice)
    with pytest.raises(ValueError, match=r"no kind of attention in common .* has self, the teacher joint"):
        choose_pairs({"t": "joint"}, {"s": "self"})


def records(heads: int, seed: int) -> dict[str, AttentionRecord]:
    """One for each of `KINDS`, of different numbers of rows and keys."""
    return {
        name: record(name, heads=heads, kind=kind, queries=4 + i % 2, keys=None if kind == "self" else 6, seed=seed + i)
        for i, (name, kind) in enumerate(KINDS.items())
    }  # fmt: skip


@pytest.mark.parametrize(
    "choice",
    [
        {}, {"kinds": ["joint"]}, {"kinds": ["cross"]}, {"streams": ["image"]}, {"streams": ["text"]},
        {"after": 0.5}, {"after": 0.4, "kinds": ["joint", "self"], "streams": ["image"]},
    ],
)  # fmt: skip
def test_the_loss_is_the_mean_over_the_chosen_blocks_own(choice: dict[str, Any]) -> None:
    teacher, student = records(5, 10), records(2, 50)
    chosen = choose_pairs(KINDS, KINDS, **choice)
    assert chosen and (len(chosen) < len(KINDS) or not choice)
    own = [shd(layer_map={name: name})(teacher, student) for name in chosen]
    found = shd(**choice)
    assert torch.equal(found(teacher, student), torch.stack(own).mean())
    assert found.last is not None and found.last[0] == tuple(chosen)


# --- on a model ----------------------------------------------------------------------------------------------------

CONDITION = {"encoder_hidden_states": torch.randn(2, 5, 6), "pooled_projections": torch.randn(2, 4)}


def sd3(heads: int, layers: int) -> SD3Transformer2DModel:
    """Joint attention in all blocks, self-attention beside it in the first two, and no text behind the last."""
    torch.manual_seed(heads)
    model = SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=8,
        num_attention_heads=heads, caption_projection_dim=8 * heads, joint_attention_dim=6,
        pooled_projection_dim=4, pos_embed_max_size=8,
        dual_attention_layers=(0, 1),
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def traced(model: SD3Transformer2DModel) -> Trace:
    return trace(model, (4, 8, 8), {name: value[:1] for name, value in CONDITION.items()})


def captured(model: SD3Transformer2DModel, noised: Tensor) -> dict[str, AttentionRecord]:
    with AttentionCapture(model) as capture, torch.no_grad():
        condition = {name: value.double() for name, value in CONDITION.items()}
        predict(model, noised, torch.tensor([20.0, 700.0]), condition)
        return dict(capture.records)


def test_terms_on_chosen_attention_of_a_model() -> None:
    teacher, student = sd3(4, 6), sd3(2, 3)
    noised = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    of_teacher, of_student = captured(teacher, noised), captured(student, noised)
    traces = traced(student), traced(teacher)

    def block(number: int) -> str:
        return f"transformer_blocks.{number}"

    image = {f"{block(s)}.attn": f"{block(2 * s + 1)}.attn" for s in range(3)}
    text = {f"{block(s)}.attn:context": f"{block(2 * s + 1)}.attn:context" for s in range(2)}
    own = {f"{block(s)}.attn2": f"{block(s)}.attn2" for s in range(2)}
    for choice, pairs in (
        ({}, image | text | own),
        ({"kinds": ["joint"], "streams": ["image"]}, image),
        ({"kinds": ["joint"], "streams": ["text"]}, text),
        ({"kinds": ["self"]}, own),
        ({"kinds": ["joint"], "after": 0.5}, {f"{block(s)}.attn{c}": f"{block(2 * s + 1)}.attn{c}"
                                              for s, c in ((1, ""), (1, ":context"), (2, ""))}),
    ):  # fmt: skip
        term = TERMS["shd"](TERMS["shd"].Config(**choice), *traces)
        mse = TERMS["attention_mse"](TERMS["attention_mse"].Config(**choice), *traces)
        assert dict(term.pairs) == dict(mse.pairs) == pairs
        singles = [shd(layer_map={name: by})(of_teacher, of_student) for name, by in term.pairs.items()]
        assert torch.equal(term.loss(of_teacher, of_student), torch.stack(singles).mean())
    pairs_of = {
        streams: dict(
            TERMS["features"](TERMS["features"].Config(streams=streams and [streams]), *traces).pairs
        )
        for streams in (None, "image", "text")
    }
    assert pairs_of["image"] == {f"{block(s)}:1": f"{block(2 * s + 1)}:1" for s in range(3)}
    assert pairs_of["text"] == {f"{block(s)}:0": f"{block(2 * s + 1)}:0" for s in range(2)}
    assert pairs_of[None] == pairs_of["image"] | pairs_of["text"]
