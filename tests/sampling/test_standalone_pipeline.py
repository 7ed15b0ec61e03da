"""A pipeline's folder in diffusers alone, where this package cannot be imported."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from small_models import small_dit
from torch import Tensor, nn

from shd_diffusion.models.families import FAMILIES, Family
from shd_diffusion.sampling import ClassConditionalPipeline, save_pipeline
from shd_diffusion.sampling.open_pipeline import open_pipeline

BLOCKS: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
PLAIN = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
CROSS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 8,
    "encoder_hid_dim_type": "image_proj",
    "encoder_hid_dim": 4,
}
MODELS = {
    "DiT": lambda: small_dit(2, layers=1),
    "a variance": lambda: small_dit(2, layers=1, out_channels=2),
    "UNet of classes": lambda: UNet2DModel(**BLOCKS, **PLAIN, num_class_embeds=4),
    "UNet of none": lambda: UNet2DModel(**BLOCKS, **PLAIN),
    "UNet by context": lambda: UNet2DConditionModel(**BLOCKS, **CROSS),
}


class Refuse(importlib.abc.MetaPathFinder):
    """No module of this package can be found."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "shd_diffusion":
            raise ModuleNotFoundError(f"no module named {name!r}")


@contextmanager
def without_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not this package installed."""
    with monkeypatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "shd_diffusion"]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "meta_path", [Refuse(), *sys.meta_path])
        with pytest.raises(ModuleNotFoundError):
            import shd_diffusion.sampling  # noqa: F401
        yield


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """diffusers copies the code of a pipeline to where it imports it from."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def random(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def images(pipeline: DiffusionPipeline, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(generator=generator, num_inference_steps=3, output_type="pt", **options).images


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_alone_makes_the_same_images(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random(MODELS[name]())
    kind = DDPMScheduler if name == "a variance" else DDIMScheduler
    options = {"variance_type": "learned_range"} if name == "a variance" else {}
    names = ["cat", "dog", "ship"] if name == "UNet of classes" else None
    save_pipeline(model, None, kind(clip_sample=False, **options), None, (1, 8, 8), tmp_path / "p", names)
    ours = ClassConditionalPipeline.from_pretrained(tmp_path / "p")
    asked = [{"num_images": 2}]
    if name != "UNet of none":
        asked += [{"class_labels": [2, 0]}, {"class_labels": [2, 0], "guidance_scale": 2.0}]
    wanted = [images(ours, **each) for each in asked]
    with without_package(monkeypatch):
        theirs = DiffusionPipeline.from_pretrained(
            tmp_path / "p", custom_pipeline="pipeline", trust_remote_code=True
        )
        assert not type(theirs).__module__.startswith("shd_diffusion")
        for each, found in zip(asked, wanted, strict=True):
            assert torch.equal(images(theirs, **each), found)
        if names:
            assert theirs.get_label_ids(["ship", "cat"]) == [2, 0] == [*ours.get_label_ids("ship"), 0]


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
        shift_factor=None,
    ).eval()


def latent_dit(classes: int) -> DiTTransformer2DModel:
    return random(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=1,
            in_channels=4,
            out_channels=4,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=classes,
        )
    )


def test_guidance_of_some_channels_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, asked = DDIMScheduler(clip_sample=False), {"class_labels": [1, 2], "guidance_scale": 4.0}
    save_pipeline(latent_dit(3), None, scheduler, None, (4, 4, 4), tmp_path / "p")
    ours = ClassConditionalPipeline.from_pretrained(tmp_path / "p")
    wanted, of_all = images(ours, **asked, guidance_channels=3), images(ours, **asked)
    with without_package(monkeypatch):
        theirs = DiffusionPipeline.from_pretrained(
            tmp_path / "p", custom_pipeline="pipeline", trust_remote_code=True
        )
        assert torch.equal(images(theirs, **asked, guidance_channels=3), wanted)
        assert torch.equal(images(theirs, **asked), of_all) and not torch.equal(wanted, of_all)


def test_a_model_with_rules_of_its_own_has_no_code_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would make other images."""
    rule = Family(timesteps=lambda model, timesteps: timesteps / 1000)
    monkeypatch.setitem(FAMILIES, "DiTTransformer2DModel", rule)
    save_pipeline(latent_dit(3), None, DDIMScheduler(clip_sample=False), None, (4, 4, 4), tmp_path / "p")
    assert not (tmp_path / "p" / "pipeline.py").exists()
    assert open_pipeline(str(tmp_path / "p")).denoiser is not None


def test_latents_are_decoded_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    save_pipeline(latent_dit(3), None, scheduler, vae(), (4, 4, 4), tmp_path / "p")
    wanted = images(ClassConditionalPipeline.from_pretrained(tmp_path / "p"), class_labels=[1, 2])
    with without_package(monkeypatch):
        theirs = DiffusionPipeline.from_pretrained(
            tmp_path / "p", custom_pipeline="pipeline", trust_remote_code=True
        )
        assert torch.equal(images(theirs, class_labels=[1, 2]), wanted)


def test_a_dit_of_1000_classes_is_a_dit_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"class {number}, also {number}" for number in range(1000)]
    save_pipeline(
        latent_dit(1000), None, DDIMScheduler(clip_sample=False), vae(), (4, 4, 4), tmp_path / "p", names
    )
    ours = open_pipeline(str(tmp_path / "p"))
    assert ours.get_label_ids(["also 7", "class 7, also 7"]) == [7, 7]
    found = images(ours, class_labels=[5, 9], guidance_scale=2.0)
    with without_package(monkeypatch):
        theirs = DiffusionPipeline.from_pretrained(tmp_path / "p")
        assert type(theirs) is DiTPipeline and theirs.get_label_ids(["also 7"]) == [7]
        wanted = images(theirs, class_labels=[5, 9], guidance_scale=2.0)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)  # it adds the same up in another order
