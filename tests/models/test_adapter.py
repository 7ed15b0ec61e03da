"""One way to call every class-conditional denoiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.models.adapter import null_label, num_tokens, predict, sample_shape
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel, draw_ids_keep

TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}


def unet(**arguments: Any) -> ModelMixin:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(2, 4),
        cross_attention_dim=12,
        **arguments,
    )


def models() -> dict[str, ModelMixin]:
    torch.manual_seed(0)
    return {
        "dit": DiTTransformer2DModel(in_channels=1, out_channels=1, num_embeds_ada_norm=5, **TRANSFORMER),
        "mdtv2": MDTv2Transformer2DModel(
            in_channels=1, num_embeds_ada_norm=5, num_decoder_layers=0, **TRANSFORMER
        ),
        "unet": unet(encoder_hid_dim_type="image_proj", encoder_hid_dim=6),
        "unet2d": UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 16),
            down_block_types=("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D"),
            norm_num_groups=4,
            num_class_embeds=6,
        ),
    }


def call(model: ModelMixin, labels: list[int], **options: Any) -> Tensor:
    noised = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return predict(model, noised, torch.tensor([3, 700]), torch.tensor(labels), **options)


@pytest.mark.parametrize("name", ["dit", "mdtv2", "unet", "unet2d"])
def test_the_prediction_depends_on_the_label_and_null_is_one(name: str) -> None:
    model = models()[name].eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert sample_shape(model) == (1, 8, 8) and null_label(model) == 5
    with torch.no_grad():
        of_two, of_null = call(model, [2, 2]), call(model, [5, 2])
    assert of_two.shape == (2, 1, 8, 8)
    assert not torch.allclose(of_two[0], of_null[0], atol=1e-3)
    assert torch.allclose(of_two[1], of_null[1], atol=1e-4)  # a kernel may sum the samples of a batch unlike


def test_a_unet_attends_to_tokens_of_its_label() -> None:
    model = models()["unet"].eval()
    with AttentionCapture(model) as capture, torch.no_grad():
        call(model, [1, 4])
        records = capture.records
    crossed = [record for record in records.values() if record.kind == "cross"]
    assert len(crossed) == 7 and len(records) == 14
    assert all(
        record.key.shape[2] == 32 and not torch.equal(record.key[0], record.key[1]) for record in crossed
    )


def test_a_saved_unet_is_the_same_function(tmp_path: Any) -> None:
    model = models()["unet"].eval()
    model.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(call(loaded, [1, 5]), call(model, [1, 5]))


def test_the_mask_reaches_the_model() -> None:
    model = models()["mdtv2"]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    kept = draw_ids_keep(2, num_tokens(model), 0.3, torch.Generator().manual_seed(0))
    noised = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model(noised, torch.tensor([3, 700]), torch.tensor([1, 2]), ids_keep=kept).sample
    assert torch.equal(call(model, [1, 2], ids_keep=kept), expected)
    assert not torch.allclose(call(model, [1, 2]), expected, atol=1e-2)


def test_models_that_cannot_be_called_so_are_named() -> None:
    with pytest.raises(ValueError, match="encoder_hid_dim_type: image_proj"):
        null_label(unet())
    with pytest.raises(ValueError, match="PixArtTransformer2DModel is not class-conditional"):
        null_label(PixArtTransformer2DModel(caption_channels=8, **TRANSFORMER))
    with pytest.raises(ValueError, match="DiTTransformer2DModel takes no token mask"):
        num_tokens(models()["dit"])
