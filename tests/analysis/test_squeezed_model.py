"""A model that attends by other maps than its own."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from diffusers import ModelMixin, UNet2DConditionModel
from small_models import small_dit
from torch import Tensor

from shd_diffusion.analysis.squeezed_model import squeezed_attention
from shd_diffusion.analysis.strategies import STRATEGIES, by_teacher_head
from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.models.denoiser import freeze, predict
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel
from shd_diffusion.squeezing import plan_merges


def dit(heads: int = 4) -> ModelMixin:
    return small_dit(heads)


def mdtv2() -> ModelMixin:
    return MDTv2Transformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=4, num_decoder_layers=2, sample_size=8
    )


def unet() -> ModelMixin:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=8,
        cross_attention_dim=16,
        encoder_hid_dim=11,
        encoder_hid_dim_type="image_proj",
    )


def randomised(model: ModelMixin) -> ModelMixin:
    source = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source) * 0.15
    return freeze(model)


def run(model: ModelMixin) -> Tensor:
    noised = torch.randn(2, model.config["in_channels"], 8, 8, generator=torch.Generator().manual_seed(1))
    return predict(model, noised, torch.tensor([30, 700]), {"class_labels": torch.tensor([1, 9])})


def squeeze(record: AttentionRecord) -> Tensor:
    plan = plan_merges(record.heads, 1)
    squeezed = STRATEGIES["closed form"].squeeze(record, 1, plan)
    return by_teacher_head(squeezed, plan, record.heads)


@pytest.mark.parametrize("build", [dit, mdtv2, unet])
def test_its_own_maps_change_nothing_and_the_model_is_left_as_it_was(build) -> None:
    model = randomised(build())
    expected = run(model)
    with squeezed_attention(model, lambda record: record.maps()):
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    with squeezed_attention(model, squeeze):
        assert (run(model) - expected).abs().max() > 1e-4
    assert torch.equal(run(model), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_blocks_put_out_what_the_literal_form_says() -> None:
    """Block 0 sees what it always sees; block 1 what block 0 has changed."""
    model = randomised(dit())
    found: list[Tensor] = []
    hooks = [
        block.attn1.register_forward_hook(lambda *passed: found.append(passed[2]))
        for block in model.transformer_blocks
    ]
    with AttentionCapture(model) as capture, squeezed_attention(model, squeeze):
        run(model)
        records = capture.records
    for hook in hooks:
        hook.remove()
    for put_out, block, record in zip(found, model.transformer_blocks, records.values(), strict=True):
        maps, weight = record.maps(), record.output_weight
        merged, _ = oracles.squeeze(maps, record.value, weight, oracles.adjacent_plan(4, 1))
        x = oracles.contributions(record.value, weight).sum(1)  # S, (B, K, C)
        expected = merged[:, 0] @ x + block.attn1.to_out[0].bias.double().numpy()
        np.testing.assert_allclose(put_out.double().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_joint_attention_is_refused() -> None:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )
    with pytest.raises(ValueError, match="two streams"), squeezed_attention(model, squeeze):
        pass
