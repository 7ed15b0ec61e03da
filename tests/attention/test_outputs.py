"""The capture of module outputs."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from shd_diffusion.attention.outputs import OutputCapture

BLOCK = "transformer_blocks.1"


@pytest.fixture
def model() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    built = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=2, in_channels=1, out_channels=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=3,
    )  # fmt: skip
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built.eval()


def call(model: nn.Module, images: Tensor) -> Tensor:
    count = len(images)
    return model(images, timestep=torch.arange(count), class_labels=torch.zeros(count).long()).sample


def test_the_last_pass_is_kept_and_the_model_left_as_it_was(model: DiTTransformer2DModel) -> None:
    first, second = torch.randn(2, 3, 1, 8, 8)
    plain = call(model, second)
    with OutputCapture(model, [BLOCK]) as capture:
        call(model, first)
        before = capture.outputs[BLOCK]
        assert torch.equal(call(model, second), plain)
        after = capture.outputs[BLOCK]
    assert before.shape == after.shape == (3, 16, 8) and not torch.equal(before, after)
    assert capture.outputs == {}
    assert not model._forward_pre_hooks and not model.get_submodule(BLOCK)._forward_hooks


def test_the_last_block_is_what_the_output_layers_start_from(model: DiTTransformer2DModel) -> None:
    """With the rest of DiT's forward pass written out: norm, shift and scale, projection, patches to pixels."""
    images = torch.randn(3, 1, 8, 8)
    with OutputCapture(model, [BLOCK]) as capture:
        expected, tokens = call(model, images), capture.outputs[BLOCK]
    labels = torch.zeros(3).long()
    condition = model.transformer_blocks[0].norm1.emb(torch.arange(3), labels, hidden_dtype=tokens.dtype)
    shift, scale = model.proj_out_1(nn.functional.silu(condition)).chunk(2, dim=1)
    patches = model.proj_out_2(model.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
    pixels = patches.view(3, 4, 4, 2, 2, 1).permute(0, 5, 1, 3, 2, 4).reshape(3, 1, 8, 8)
    torch.testing.assert_close(pixels, expected)


def test_reentrant_checkpointing_is_refused(model: DiTTransformer2DModel) -> None:
    model.train()
    model._set_gradient_checkpointing(
        True, lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=True)
    )
    with OutputCapture(model, [BLOCK]), pytest.raises(RuntimeError, match="use_reentrant=False"):
        call(model, torch.randn(2, 1, 8, 8))


def test_an_output_that_is_not_one_tensor_is_named(model: DiTTransformer2DModel) -> None:
    name = "transformer_blocks.0.norm1"
    with OutputCapture(model, [name]), pytest.raises(RuntimeError, match=rf"`{name}` puts out tuple"):
        call(model, torch.randn(2, 1, 8, 8))


def test_parts_of_a_tuple_have_names_of_their_own(model: DiTTransformer2DModel) -> None:
    norm = "transformer_blocks.0.norm1"  # (tokens, gates and shifts)
    images = torch.randn(2, 1, 8, 8)
    with OutputCapture(model, [f"{norm}:0", f"{norm}:4", BLOCK]) as capture:
        call(model, images)
        outputs = capture.outputs
    assert {name: output.shape for name, output in outputs.items()} == {
        f"{norm}:0": (2, 16, 8), f"{norm}:4": (2, 8), BLOCK: (2, 16, 8)
    }  # fmt: skip
    with OutputCapture(model, [f"{norm}:5"]), pytest.raises(RuntimeError, match=rf"no tensor `{norm}:5`"):
        call(model, images)


def test_an_unknown_module(model: DiTTransformer2DModel) -> None:
    with pytest.raises(AttributeError):
        OutputCapture(model, ["transformer_blocks.9"])
