"""One way to call every denoiser, and to teach it."""

from __future__ import annotations

from dataclasses import replace
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
from families_with_conditions import TAUGHT
from torch import Tensor

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.losses import LossesConfig, build_terms
from shd_diffusion.losses.term import Batch
from shd_diffusion.models.denoiser import (
    drop_condition,
    freeze,
    null_condition,
    num_classes,
    num_tokens,
    pad,
    predict,
    sample_shape,
)
from shd_diffusion.models.families import pack, unpack
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel
from shd_diffusion.models.trace import trace
from shd_diffusion.training.objectives import TrainingLoss

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


def call(model: ModelMixin, labels: list[int], **options: Tensor) -> Tensor:
    noised = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = {"class_labels": torch.tensor(labels), **options}
    return predict(model, noised, torch.tensor([3, 700]), condition)


@pytest.mark.parametrize("name", ["dit", "mdtv2", "unet", "unet2d"])
def test_the_prediction_depends_on_the_label_and_null_is_one(name: str) -> None:
    model = models()[name].eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert sample_shape(model) == (1, 8, 8) and num_classes(model) == 5
    with torch.no_grad():
        of_two, of_null = call(model, [2, 2]), call(model, [5, 2])
    assert of_two.shape == (2, 1, 8, 8)
    assert not torch.allclose(of_two[0], of_null[0], atol=1e-3)
    assert torch.allclose(of_two[1], of_null[1], atol=1e-5)


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
    kept = torch.rand(2, num_tokens(model), generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :9]
    noised = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = model(noised, torch.tensor([3, 700]), torch.tensor([1, 2]), ids_keep=kept).sample
    assert torch.equal(call(model, [1, 2], ids_keep=kept), expected)
    assert not torch.allclose(call(model, [1, 2]), expected, atol=1e-2)


def test_models_without_labels_or_masks() -> None:
    for model in (unet(), PixArtTransformer2DModel(caption_channels=8, **TRANSFORMER)):
        assert num_classes(model) is None and null_condition(model) == {}
    with pytest.raises(ValueError, match="DiTTransformer2DModel takes no token mask"):
        num_tokens(models()["dit"])


def test_conditions_are_dropped_where_there_is_a_null_one() -> None:
    text, mask = torch.randn(3, 5, 6), torch.ones(3, 5, dtype=torch.bool)
    null, dropped = {"text": torch.randn(1, 5, 6)}, torch.tensor([False, True, False])
    found = drop_condition({"text": text, "mask": mask}, null, dropped)
    assert torch.equal(found["text"], torch.stack([text[0], null["text"][0], text[2]]))
    assert torch.equal(found["mask"], mask)


def test_conditions_of_different_lengths_are_padded_at_the_end() -> None:
    short = {"text": torch.ones(2, 3), "mask": torch.ones(2, dtype=torch.bool), "guidance": torch.tensor(1.0)}
    long = {"text": torch.ones(4, 3), "mask": torch.ones(4, dtype=torch.bool), "guidance": torch.tensor(2.0)}
    found = pad([short, long])
    assert torch.equal(found["text"][0], torch.tensor([1.0, 1, 0, 0])[:, None].expand(4, 3))
    assert found["mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert found["guidance"].tolist() == [1, 2] and torch.equal(pad([long])["text"], long["text"][None])


def test_unpacking_inverts_packing() -> None:
    latents = torch.randn(2, 3, 4, 8)
    tokens = pack(latents, 2)
    assert tokens.shape == (2, 8, 12) and torch.equal(unpack(tokens, latents.shape[-2:], 2), latents)


# --- every family --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAUGHT)
@torch.no_grad()
def test_a_prediction_is_what_the_pipeline_computes(name: str) -> None:
    taught = TAUGHT[name]
    model, drawn = taught.build(4), taught.draw()
    found, expected = predict(model, *drawn), taught.direct(model, *drawn)
    assert found.shape[0] == 2 and found.shape[2:] == taught.shape[1:] and found.std() > 0
    if taught.exact:
        assert torch.equal(found, expected)
    else:  # t / 1000 and t · 1e-3 differ by rounding, in the angles of the timestep's sines too
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def check_teaching(teacher: ModelMixin, student: ModelMixin, drawn: tuple, flow: bool = False) -> None:
    """SHD alone gives every parameter that the prediction needs a gradient, queries and keys one that is not 0,
    and the teacher none."""
    noised, timesteps, condition = drawn
    one = {name: value[:1] for name, value in condition.items()}
    traces = (trace(model, tuple(noised.shape[1:]), one) for model in (student, teacher))
    off = {name: {"weight": 0.0} for name in ("denoise", "variance", "output")}
    losses = LossesConfig.model_validate({**off, "shd": {}})
    terms = build_terms(losses, *traces, seed=0)
    assert list(terms) == ["shd"]
    scheduler = make_scheduler_of_process(DiffusionConfig(objective="flow" if flow else "epsilon"))
    batch = Batch(torch.randn_like(noised), torch.randn_like(noised), noised, timesteps, condition)
    with TrainingLoss(ForwardProcess.from_scheduler(scheduler), terms, student, freeze(teacher), 10) as loss:
        value = loss(student, batch, 0)["shd"]
    value.backward()
    assert value.isfinite() and value > 0
    for block in {name.partition(":")[0] for name in terms["shd"].pairs}:
        for projection in ("to_q", "to_k"):
            gradient = student.get_submodule(f"{block}.{projection}").weight.grad
            assert gradient is not None and gradient.isfinite().all() and gradient.any(), block
    assert all(parameter.grad is None for parameter in teacher.parameters())
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    student.zero_grad()
    predict(
        student, *drawn
    ).sum().backward()  # QwenImage's text ends in its last block, MDTv2's mask in no pass
    assert reached == {name for name, parameter in student.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", TAUGHT)
def test_four_heads_teach_two(name: str) -> None:
    taught = TAUGHT[name]
    check_teaching(taught.build(4, seed=0), taught.build(2, seed=1), taught.draw(), taught.flow)


@pytest.mark.parametrize("name", ["SD 1.5", "PixArt", "Flux"])
def test_samples_that_are_not_square(name: str) -> None:
    taught = replace(TAUGHT[name], shape=(4, 8, 16))
    teacher, drawn = taught.build(4), taught.draw()
    with torch.no_grad():
        torch.testing.assert_close(
            predict(teacher, *drawn), taught.direct(teacher, *drawn), rtol=1e-3, atol=1e-3
        )
    check_teaching(teacher, taught.build(2, seed=1), drawn, taught.flow)
