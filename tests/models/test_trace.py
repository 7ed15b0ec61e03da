"""What a model's forward pass would look like."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import HunyuanImageTransformer2DModel, PixArtTransformer2DModel
from families_with_conditions import TAUGHT
from small_models import small_dit
from tiny_pipelines import PIPELINES, pixart_transformer

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.models.denoiser import predict
from shd_diffusion.models.factory import ModelConfig, build_model
from shd_diffusion.models.own_width import OWN_WIDTHS, width_to_set
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
    ended = ["transformer_blocks.0.attn:context"] if name == "QwenImage" else []  # its only block
    assert list(found.records) == [block for block in records if block not in ended]
    for block, record in ((block, records[block]) for block in found.records):
        traced = found.records[block]
        assert (traced.kind, traced.heads) == (record.kind, record.heads)
        assert (traced.query.shape, traced.key.shape) == (record.query.shape, record.key.shape)
        assert traced.output_weight.shape == record.output_weight.shape
    assert found.heads == max(record.heads for record in records.values())


def test_a_model_without_a_block_that_can_be_captured_has_no_heads() -> None:
    taught = replace(TAUGHT["UNet2DModel"], arguments={
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False
    })  # fmt: skip
    found = trace(taught.build(2), taught.shape, {})
    assert found.records == {} and found.heads == 0 and found.output.shape == (1, 4, 8, 8)


def test_a_model_that_picks_out_the_tokens_of_a_mask_is_traced() -> None:
    """HunyuanImage's text tokens, by boolean indices."""
    model = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=6, text_embed_2_dim=6, rope_axes_dim=(4, 4),
    )  # fmt: skip
    mask = torch.tensor([[True, True, False, False]])
    text = {"encoder_hidden_states": torch.randn(1, 4, 6), "encoder_attention_mask": mask}
    letters = {f"{name}_2": value for name, value in text.items()}
    found = trace(model, (4, 4, 4), text | letters)
    assert found.output.shape == (1, 4, 4, 4)
    assert found.heads == 3 and "transformer_blocks.0.attn" in found.records


STREAMS = {
    "SD3": {
        "transformer_blocks.0.attn:0": "image",
        "transformer_blocks.0.attn:1": "text",
        "transformer_blocks.0.attn2": "image",  # one tensor
        "transformer_blocks.0:0": "text",
        "transformer_blocks.0:1": "image",
        "transformer_blocks.1.attn:0": "image",  # here the text ends
        "transformer_blocks.1:1": "image",
    },
    "Flux": {
        "transformer_blocks.0.attn:0": "image",
        "transformer_blocks.0.attn:1": "text",
        "transformer_blocks.0:0": "text",
        "transformer_blocks.0:1": "image",
        "single_transformer_blocks.0.attn": "both",
        "single_transformer_blocks.0:1": "image",
    },
    "QwenImage": {"transformer_blocks.0.attn:0": "image", "transformer_blocks.0:1": "image"},
}


@pytest.mark.parametrize("text", [5, 16])
@pytest.mark.parametrize("name", STREAMS)
def test_which_of_what_a_block_puts_out_is_the_text(name: str, text: int) -> None:
    """Also where it has as many tokens as the image, 16; what the prediction does not depend on is left out."""
    taught = TAUGHT[name]
    model, (_, _, condition) = taught.build(4), taught.draw(1)
    longer = {
        key: value[:, :1].repeat_interleave(text, 1) if key.startswith("encoder") else value
        for key, value in condition.items()
    }
    found = trace(model, taught.shape, longer)
    tokens = {"image": 16, "text": text, "both": 16 + text}
    assert {key: output.shape[1] for key, output in found.outputs.items()} == {
        key: tokens[stream] for key, stream in STREAMS[name].items()
    }
    assert found.text_outputs == {key for key, stream in STREAMS[name].items() if stream == "text"}


def test_outputs_of_a_model_with_one_stream() -> None:
    taught = TAUGHT["SD 1.5"]
    found = trace(taught.build(2), taught.shape, taught.condition(1))
    block = "mid_block.attentions.0.transformer_blocks.0"
    shapes = {name: found.outputs[name].shape for name in (block, f"{block}.attn1", f"{block}.attn2")}
    assert set(shapes.values()) == {(1, 16, 16)} and not found.text_outputs
    taught = TAUGHT["UNet2DModel"]
    found = trace(taught.build(2), taught.shape, {})
    assert found.outputs["mid_block.attentions.0"].shape == (1, 16, 4, 4)


def test_a_variance_is_seen_in_the_output() -> None:
    assert not trace(small_dit(2), (1, 8, 8), LABEL).predicts_variance
    assert trace(small_dit(2, out_channels=2), (1, 8, 8), LABEL).predicts_variance


def test_what_a_model_does_not_take_is_said_with_the_reason() -> None:
    model = small_dit(2)
    with pytest.raises(
        ValueError,
        match=r"DiTTransformer2DModel takes no samples \(3, 8, 8\) with class_labels \(`pos_embed.proj`: \w",
    ):
        trace(model, (3, 8, 8), LABEL)
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) with no condition \(`.*embedding_table`: \w"):
        trace(model, (1, 8, 8), {})
    with pytest.raises(ValueError, match=r"with text \(.*unexpected keyword argument 'text'"):
        trace(model, (1, 8, 8), {"text": torch.zeros(1, 5, 6)})
    with pytest.raises(ValueError, match=r"\(1, 8, 16\) .*\(.*shape"):  # diffusers' DiT puts out squares only
        trace(model, (1, 8, 16), LABEL)
    unfit = dict(pixart_transformer(4, 64).config) | {"cross_attention_dim": 36}
    with pytest.raises(ValueError, match=r"\(`transformer_blocks.0.attn2.to_k`: \w"):
        trace(PixArtTransformer2DModel(**unfit), (4, 8, 8), {"encoder_hidden_states": torch.zeros(1, 5, 8)})


OF_HEADS = "to `num_attention_heads` times `attention_head_dim`"


@pytest.mark.parametrize(
    ("family", "text", "says"),
    [
        ("pixart-sigma", "caption_channels", f"set `cross_attention_dim` {OF_HEADS}, 24"),
        ("sd3", "joint_attention_dim", f"set `caption_projection_dim` {OF_HEADS}, 16"),
        ("auraflow", "joint_attention_dim", f"set `caption_projection_dim` {OF_HEADS}, 16"),
        (
            "lumina2",
            "cap_feat_dim",
            "set `hidden_size` to `num_attention_heads` times the sum of `axes_dim_rope`, 16",
        ),
        ("z-image", "cap_feat_dim", "set `dim` to `n_heads` times the sum of `axes_dims`, 16"),
    ],
)
def test_a_width_that_does_not_fit_the_heads_is_told(family: str, text: str, says: str) -> None:
    """In a student of two heads with the width of its teacher's four."""
    models = [PIPELINES[family](heads).transformer for heads in (2, 4)]
    (student, teacher), name = (model.config for model in models), type(models[0]).__name__
    arguments = {k: v for k, v in student.items() if not k.startswith("_")}
    key = OWN_WIDTHS[name][0]
    assert width_to_set(name, student) == width_to_set(name, teacher) == ""
    config = ModelConfig.model_validate({"class": name, "arguments": {**arguments, key: teacher[key]}})
    condition = {"encoder_hidden_states": torch.randn(1, 5, student[text])}
    condition |= {"pooled_projections": torch.randn(1, 16)} if family == "sd3" else {}
    condition |= {"encoder_attention_mask": torch.ones(1, 5).bool()} if family == "lumina2" else {}
    shape = (student["in_channels"], 8, 8)
    with pytest.raises(ValueError, match=f"; {says}$"):
        trace(build_model(config), shape, condition)
