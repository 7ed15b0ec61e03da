"""The listing of attention blocks and of the pairs that SHD would compare."""

from __future__ import annotations

from io import StringIO

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from rich.console import Console

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.models.mdtv2 import MDTV2_SIZES, MDTv2Transformer2DModel
from shd_diffusion.training.inspect_models import (
    inspect_model,
    merges_of,
    pair_rows,
    render,
    render_pair,
)


def dit(heads: int = 12, blocks: int = 6, patch: int = 2) -> ModelMixin:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=blocks,
        sample_size=8,
        patch_size=patch,
        num_embeds_ada_norm=10,
    )


def printed(teacher: ModelMixin, student: ModelMixin | None = None, width: int = 200) -> str:
    """A model's blocks, or the pairs of two, as a terminal shows them."""
    rows = inspect_model(teacher)
    table = render(teacher, rows)
    if student is not None:
        student_rows = inspect_model(student)
        table = render_pair(rows, student_rows, pair_rows(rows, student_rows))
    console = Console(width=width, record=True, file=StringIO())
    console.print(table)
    return console.export_text()


def test_tokens_are_those_of_a_real_forward_pass() -> None:
    model = dit(heads=3, blocks=2)
    rows = inspect_model(model)
    with AttentionCapture(model) as capture, torch.no_grad():
        model(torch.zeros(1, 1, 8, 8), timestep=torch.tensor([0]), class_labels=torch.tensor([3]))
        records = capture.records
    assert [row.block.name for row in rows] == list(records)
    for row, record in zip(rows, records.values(), strict=True):
        assert row.record is not None and row.record.query.shape == record.query.shape
        assert row.record.query.device.type == "meta"
        assert (row.tokens, row.block.heads, row.block.head_dim) == ("16", 3, 8)


def test_the_largest_mdtv2_is_listed_without_memory() -> None:
    with torch.device("meta"):
        model = MDTv2Transformer2DModel(**MDTV2_SIZES["XL/2"], sample_size=32, in_channels=4)
    rows = inspect_model(model)
    assert len(rows) == 29 and {row.block.heads for row in rows} == {16}
    assert {row.tokens for row in rows if row.block.name != "side_block.attn"} == {"256"}


def test_a_student_of_fewer_heads_and_blocks() -> None:
    teacher, student = inspect_model(dit(12, 6)), inspect_model(dit(5, 3))
    pairs = pair_rows(teacher, student)
    assert list(pairs.values()) == [f"transformer_blocks.{i}.attn1" for i in (1, 3, 5)]
    assert [len(groups) for groups in merges_of(teacher[1], student[0])] == [6, 5]
    text = printed(dit(12, 6), dit(5, 3))
    assert "12→6→5" in text and "0+1+2+3 4+5 6+7 8+9 10+11" in text


def test_a_narrow_terminal_cuts_no_name() -> None:
    text = printed(dit(12, 2), dit(5, 2), width=80)
    assert "12→6→5" in text and "0.attn1" in text and "…" not in text


def test_a_coarser_student_is_paired_and_shown() -> None:
    text = printed(dit(4, 2, patch=2), dit(2, 2, patch=4))
    assert "16 → 4" in text


def test_pairs_that_cannot_be_compared_say_why() -> None:
    teacher, student = inspect_model(dit(2)), inspect_model(dit(4))
    with pytest.raises(ValueError, match="cannot be squeezed to 4"):
        merges_of(teacher[0], student[0])
    assert "cannot be squeezed to 4" in printed(dit(2), dit(4))


def test_an_unmappable_student_is_an_error() -> None:
    with pytest.raises(ValueError, match="block"):
        pair_rows(inspect_model(dit(4, 1)), inspect_model(dit(2, 3)), [0, 1, 2])


def test_blocks_that_an_ordinary_pass_skips_are_listed_and_not_paired() -> None:
    model = MDTv2Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=4, num_decoder_layers=2, sample_size=8
    )
    rows = inspect_model(model)
    assert [row.block.name for row in rows if row.record is None] == ["side_block.attn"]
    assert "side_block.attn" not in pair_rows(rows, rows)


def test_a_text_to_image_model_is_listed_without_tokens() -> None:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=3,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=6,
        sample_size=8,
    )
    linear, cross = inspect_model(model)
    assert not linear.block.capturable and cross.block.capturable and cross.tokens == "?"
    assert list(pair_rows([linear, cross], [linear, cross])) == [cross.block.name]
    assert "linear attention has no softmax" in printed(model)
