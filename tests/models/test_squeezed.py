from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, Lumina2Transformer2DModel
from families import FAMILIES, output
from small_models import small_dit

import shd_diffusion.models.squeezed
from shd_diffusion.attention import attention_blocks
from shd_diffusion.models import OriginalDiTTransformer2DModel
from shd_diffusion.models.squeezed import (
    Squeezed,
    cut_heads,
    cut_neurons,
    declare_shape,
    feed_forwards,
    shape,
    squeezed_class,
    widen_heads,
)
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline

REFUSED = {
    "prx", "unet added keys", "ace-step", "cosmos3", "ideogram4", "joyimage", "krea2", "lumina-next", "mochi",
    "stable-audio-3", "wan-animate-2",
}  # fmt: skip
CUTTABLE = sorted(set(FAMILIES) - REFUSED)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_layouts_that_are_not_known_are_refused(name):
    model = FAMILIES[name].build()
    for block in attention_blocks(model).values():
        if block.capturable:
            with pytest.raises(ValueError, match=r"squeezed|none can leave"):
                cut_heads(model, block.name, torch.arange(block.heads).flip(0))


@pytest.mark.parametrize("name", CUTTABLE)
def test_all_heads_in_another_order_are_the_same_function(name):
    family = FAMILIES[name]
    model = family.build()
    expected = output(model(**family.draw()))
    cut = 0
    for block in attention_blocks(model).values():
        if not block.capturable:
            continue
        cut_heads(model, block.name, torch.arange(block.heads).flip(0))
        cut += block.heads > 1
    for path, layer in feed_forwards(model).items():
        cut_neurons(model, path, torch.arange(layer.neurons).flip(0))
    assert cut
    # sums in another order, in float32
    torch.testing.assert_close(output(model(**family.draw())), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dit", "mdtv2", "pixart", "unet2d-condition"])
def test_wider_heads_are_the_same_function(name):
    family = FAMILIES[name]
    model = family.build()
    expected = output(model(**family.draw()))
    for block in attention_blocks(model).values():
        widen_heads(model, block.name, block.head_dim + 3)
    assert all(block.head_dim in (11, 19) for block in attention_blocks(model).values())
    torch.testing.assert_close(output(model(**family.draw())), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "block"), [("hunyuan-dit", "blocks.0.attn1"), ("flux", "transformer_blocks.0.attn")]
)
def test_rotated_or_normalised_heads_are_not_widened(name, block):
    with pytest.raises(ValueError, match="heads of another width"):
        widen_heads(FAMILIES[name].build(), block, 16)


def test_a_squeezed_model_is_built_by_its_config_alone():
    heads = {"transformer_blocks.0.attn1": 1, "transformer_blocks.1.attn1": 3}
    kind = squeezed_class(DiTTransformer2DModel)
    model = kind(
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        in_channels=1,
        sample_size=8,
        num_embeds_ada_norm=10,
        squeezed_heads=heads,
        squeezed_neurons={"transformer_blocks.1.ff": 7},
    )
    assert isinstance(model, DiTTransformer2DModel) and kind.__name__ == "SqueezedDiTTransformer2DModel"
    assert shape(model) == {**heads, "transformer_blocks.0.ff": 128, "transformer_blocks.1.ff": 7}
    again = kind.from_config(model.config)
    assert shape(again) == shape(model)
    assert model(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2).long()).sample.shape == (2, 1, 8, 8)


def test_a_model_whose_heads_share_keys_is_built_by_its_config():
    """12 heads on 4 keys: 8 are 2 on each, and 4 one on each, unless the config says 2 on each of 2."""
    sizes = {"hidden_size": 72, "num_attention_heads": 12, "num_kv_heads": 4}
    arguments = {**FAMILIES["lumina2"].arguments, **sizes}
    kind = squeezed_class(Lumina2Transformer2DModel)
    names = ["layers.0.attn", "noise_refiner.0.attn", "context_refiner.0.attn"]
    heads = dict(zip(names, (8, 4, 4), strict=True))
    model = kind(**arguments, squeezed_heads=heads, squeezed_key_value_heads={names[2]: 2})
    blocks = attention_blocks(model)
    assert [blocks[name].heads for name in names] == [8, 4, 4]
    assert [blocks[name].key_value_heads for name in names] == [4, 4, 2]
    assert attention_blocks(kind.from_config(model.config)) == blocks
    assert output(model.eval()(**FAMILIES["lumina2"].draw())).isfinite().all()
    for wrong in (11, 13, 0):
        with pytest.raises(ValueError, match=f"12 heads on 4 keys and values cannot become {wrong}"):
            kind(**arguments, squeezed_heads={names[0]: wrong})


def test_as_many_heads_go_on_to_share_each_key():
    with pytest.raises(ValueError, match=r"shares keys among heads, as many each; not so \[0, 1, 2\]"):
        cut_heads(FAMILIES["lumina2"].build(), "layers.0.attn", torch.tensor([0, 1, 2]))


def test_what_diffusers_shards_a_fused_layer_by_follows():
    model = FAMILIES["flux2"].build()  # 3 heads of 8, 72 neurons
    block = model.single_transformer_blocks[0].attn
    cut_heads(model, "single_transformer_blocks.0.attn", torch.tensor([2, 0]))
    cut_neurons(model, "single_transformer_blocks.0.attn.mlp_act_fn", torch.arange(10))
    assert block.to_qkv_mlp_proj._tp_packed_col_blocks == [16, 16, 16, 10, 10]
    assert block.to_out._tp_packed_row_blocks == [16, 10]
    assert block.to_qkv_mlp_proj.weight.shape == (68, 24) and block.to_out.weight.shape == (24, 26)


def test_the_class_is_found_by_its_name_and_made_once():
    kind = shd_diffusion.models.squeezed.SqueezedOriginalDiTTransformer2DModel
    assert kind is squeezed_class(OriginalDiTTransformer2DModel) is squeezed_class(kind)
    assert issubclass(kind, Squeezed)
    assert pickle.loads(pickle.dumps(kind)) is kind
    for wrong in ("SqueezedNothing", "SqueezedDDPMScheduler", "Nothing"):
        with pytest.raises(AttributeError, match=wrong):
            getattr(shd_diffusion.models.squeezed, wrong)


@pytest.mark.parametrize("kind", [DiTTransformer2DModel, OriginalDiTTransformer2DModel])
def test_a_pipeline_holds_a_squeezed_model(tmp_path, kind):
    model = kind.from_config(small_dit(4).config).eval()
    stock = shape(model)
    cut_heads(model, "transformer_blocks.0.attn1", torch.tensor([2, 0]))
    cut_neurons(model, "transformer_blocks.1.ff", torch.arange(5))
    declare_shape(model, stock)
    ClassConditionalPipeline(model, DDPMScheduler()).save_pretrained(tmp_path)
    assert (tmp_path / "denoiser" / "diffusion_pytorch_model.safetensors").is_file()
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path).denoiser.eval()
    assert type(loaded) is squeezed_class(kind) and shape(loaded) == shape(model)
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 10])
    torch.testing.assert_close(loaded(*inputs).sample, model(*inputs).sample, rtol=0, atol=0)
    if kind is OriginalDiTTransformer2DModel:
        assert loaded.transformer_blocks[0].norm1.emb.time_proj.downscale_freq_shift == 0
    torch.testing.assert_close(copy.deepcopy(loaded)(*inputs).sample, loaded(*inputs).sample, rtol=0, atol=0)


def test_a_squeezed_model_trains_also_with_checkpointing():
    model = squeezed_class(DiTTransformer2DModel).from_config(
        {**small_dit(4).config, "squeezed_heads": {"transformer_blocks.0.attn1": 1}}
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 2])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model.eval()(*inputs).sample.square().sum().backward()
        gradients.append(model.transformer_blocks[0].attn1.to_q.weight.grad.clone())
    assert gradients[0].shape == (8, 32) and gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_model_that_its_class_describes_keeps_it():
    model = small_dit(4)
    declare_shape(model, shape(model))
    assert type(model) is DiTTransformer2DModel and "squeezed_heads" not in model.config


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("lumina-next", "layers.0.attn2", "gated by head outside"),
        ("unet added keys", "down_blocks.1.attentions.0", "processor of fixed width"),
        ("prx", "blocks.0.attention", "layout whose heads cannot be squeezed"),
    ],
)
def test_blocks_whose_heads_cannot_leave_are_refused(name, block, message):
    with pytest.raises(ValueError, match=message):
        cut_heads(FAMILIES[name].build(), block, torch.tensor([0]))


def test_heads_and_neurons_that_are_not_there_are_refused():
    model = small_dit(4)
    for kept in ([], [4]):
        with pytest.raises(ValueError, match="attn1` has 4 heads"):
            cut_heads(model, "transformer_blocks.0.attn1", torch.tensor(kept, dtype=torch.long))
    with pytest.raises(ValueError, match="128 neurons"):
        cut_neurons(model, "transformer_blocks.0.ff", torch.tensor([128]))


def test_fused_projections_are_refused():
    model = FAMILIES["pixart"].build()
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        cut_heads(model, "transformer_blocks.0.attn1", torch.tensor([0]))
