"""What a model's forward pass would look like."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families_with_conditions import TAUGHT
from small_models import small_dit

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.models.denoiser import predict
from shd_diffusion.models.trace import trace

LABEL = {"class_labels": torch.tensor([3])}


@pytest.mark.parametrize("name", [name for name in TAUGHT if name != "MDTv2 masked"])
def test_a_trace_has_the_shapes_of_a_real_pass(name: str) -> None:
    taught = TAUGHT[name]
    model, (noised, timesteps, condition) = taught.build(4), taught.draw(1)
    with AttentionCapture(model) as capture, torch.no_grad():
        output = predict(model, noised, timesteps, condition)
        records = dict(capture.records)
    found = trace(model, taught.shape, condition)
    assert found.output.shape == output.shape and found.output.device.type == "meta"
    assert list(found.records) == list(records)
    for block, record in records.items():
        traced = found.records[block]
        assert (traced.kind, traced.heads) == (record.kind, record.heads)
        assert (traced.query.shape, traced.key.shape) == (record.query.shape, record.key.shape)
        assert found.width(block) == record.output_weight.shape[0]
    assert found.heads == max(record.heads for record in records.values())


def test_a_model_without_a_block_that_can_be_captured_has_no_heads() -> None:
    taught = replace(TAUGHT["UNet2DModel"], arguments={
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False
    })  # fmt: skip
    found = trace(taught.build(2), taught.shape, {})
    assert found.records == {} and found.heads == 0 and found.output.shape == (1, 4, 8, 8)


def test_a_variance_is_seen_in_the_output() -> None:
    assert not trace(small_dit(2), (1, 8, 8), LABEL).predicts_variance
    assert trace(small_dit(2, out_channels=2), (1, 8, 8), LABEL).predicts_variance


def test_what_a_model_does_not_take_is_said_with_the_reason() -> None:
    model = small_dit(2)
    with pytest.raises(
        ValueError, match=r"DiTTransformer2DModel takes no samples \(3, 8, 8\) with class_labels \(\w"
    ):
        trace(model, (3, 8, 8), LABEL)
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) with no condition \(\w"):
        trace(model, (1, 8, 8), {})
    with pytest.raises(ValueError, match=r"with text \(.*unexpected keyword argument 'text'"):
        trace(model, (1, 8, 8), {"text": torch.zeros(1, 5, 6)})
    with pytest.raises(ValueError, match=r"\(1, 8, 16\) .*\(.*shape"):  # diffusers' DiT puts out squares only
        trace(model, (1, 8, 16), LABEL)
