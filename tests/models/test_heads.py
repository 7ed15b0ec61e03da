"""Teachers whose heads are of a known kind."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import typer
from alter_heads import alter
from diffusers import ModelMixin
from heads_of_a_kind import make_heads_alike, shuffle_heads, weaken_heads
from small_models import small_dit
from torch import Tensor
from typer.testing import CliRunner

from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel


@pytest.fixture()
def model() -> ModelMixin:
    torch.manual_seed(0)
    built = small_dit(6, head_dim=4).eval()
    for parameter in built.parameters():  # biases too, which start at 0
        torch.nn.init.normal_(parameter, std=0.2)
    return built


@torch.no_grad()
def run(model: ModelMixin) -> tuple[Tensor, list[AttentionRecord]]:
    noised = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with AttentionCapture(model) as capture:
        put_out = model(noised, timestep=torch.tensor([5, 400, 900]), class_labels=torch.arange(3)).sample
        return put_out, list(capture.records.values())


def test_shuffled_heads_compute_the_same_with_their_maps_in_another_order(model: ModelMixin) -> None:
    expected, before = run(model)
    shuffle_heads(model, seed=3)
    found, after = run(model)
    torch.testing.assert_close(found, expected)
    orders = []
    for old, new in zip(before, after, strict=True):
        distances = (old.maps()[:, :, None] - new.maps()[:, None]).abs().amax((0, 3, 4))
        assert distances.min(0).values.max() < 1e-5
        orders.append(distances.argmin(0).tolist())
    assert sorted(orders[0]) == list(range(6)) and orders[0] != orders[1]


def test_heads_made_alike_share_maps_and_keep_their_values(model: ModelMixin) -> None:
    _, before = run(model)
    noisy = copy.deepcopy(model)
    make_heads_alike(model, noise=0.0, seed=0)
    make_heads_alike(noisy, noise=0.1, seed=0)
    _, (first, _) = run(model)
    torch.testing.assert_close(first.maps()[:, 1::2], before[0].maps()[:, ::2])
    torch.testing.assert_close(first.value, before[0].value)
    maps = run(noisy)[1][0].maps()
    assert 1e-4 < (maps[:, 1::2] - maps[:, ::2]).abs().max() < (maps[:, 2] - maps[:, 0]).abs().max()


def test_weakened_heads_contribute_less(model: ModelMixin) -> None:
    weight = model.transformer_blocks[1].attn1.to_out[0].weight
    before = weight.detach().clone()
    weaken_heads(model, 0.25)
    scale = torch.tensor([1, 0.25]).repeat(3).repeat_interleave(4)
    torch.testing.assert_close(weight.detach(), before * scale)


def test_heads_of_other_layouts_are_refused() -> None:
    model = MDTv2Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=4, num_decoder_layers=2, sample_size=8
    )
    with pytest.raises(ValueError, match="BiasedAttention"):
        shuffle_heads(model, 0)


def test_an_altered_teacher_replaces_nothing(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(alter)
    (tmp_path / "there").mkdir()
    for run, output, says in (("there", "there", "exists already"), ("nowhere", "new", "nowhere")):
        result = CliRunner().invoke(app, [str(tmp_path / run), "--output", str(tmp_path / output)])
        assert result.exit_code == 2 and says in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
