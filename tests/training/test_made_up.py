"""What a dry run makes up, against what the pipelines tell their denoisers; and dry runs of text-to-image models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import yaml
from commands import ROOT, command, sets
from config_only import config_only
from diffusers import ModelMixin
from safetensors import SafetensorError
from small_models import small_dit
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE, TEXT

from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.models.prompts import PromptEncoder, denoiser_name
from shd_diffusion.training.dry_run import why_not_measured
from shd_diffusion.training.made_up import latent_shape, made_up_condition, text_length, vae_stride

HUB = ROOT / "configs" / "text-to-image" / "teachers"
KNOWN = [
    "sd1.5", "sdxl", "pixart-alpha", "pixart-sigma", "sd3", "sd3.5", "flux-dev", "flux-schnell", "sana", "qwen-image",
    "lumina2", "auraflow", "cogview4",
]  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_conditions_are_what_the_pipeline_tells_its_denoiser(name: str) -> None:
    pipeline = PIPELINES[name]()
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    (told,) = PromptEncoder(pipeline, SIZE, ARGUMENTS.get(name)).encode(["a cat"])
    tokens = len(told["encoder_hidden_states"])
    made_up = made_up_condition(denoiser, TEXT if name in ("sd3", "sd3.5") else tokens, clip=TEXT)
    assert made_up is not None
    assert {n: (v.shape, v.dtype) for n, v in made_up.items()} == {
        n: (v.shape, v.dtype) for n, v in told.items()
    }


def test_labels_and_nothing() -> None:
    assert made_up_condition(small_dit(2), 3) == {"class_labels": torch.tensor(0)}
    unconditional = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    assert made_up_condition(unconditional, 3) == {}


@pytest.mark.parametrize(
    ("name", "length"),
    [("sd15", 77), ("sdxl", 77), ("pixart-sigma", 300), ("sd35-medium", 256), ("flux-dev", 512)],
)
def test_the_length_of_prompts_is_the_pipelines(name: str, length: int) -> None:
    assert text_length(str(HUB / name), {}) == length
    assert text_length(str(HUB / name), {"max_sequence_length": 64}) == 64


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("sd15", (4, 64, 64)),
        ("sdxl", (4, 128, 128)),
        ("sd35-medium", (16, 128, 128)),
        ("flux-dev", (16, 128, 128)),
    ],
)
def test_latents_follow_from_the_images_that_are_prepared(name: str, shape: tuple[int, ...]) -> None:
    """Flux's config has no `sample_size`."""
    path = ROOT / "configs" / "text-to-image" / f"{name}.yaml"
    config = read_config(path, DistillConfig, [f"teacher.path={HUB / name}"])
    folder = next(f for f in (HUB / name / "unet", HUB / name / "transformer") if f.is_dir())
    model: Any = SimpleNamespace(config=json.loads((folder / "config.json").read_text()))
    model = type(model.config["_class_name"], (SimpleNamespace,), {})(config=model.config)
    assert latent_shape(config, model) == shape
    smaller = read_config(path, DistillConfig, [f"teacher.path={HUB / name}", "data.image_size=256"])
    assert latent_shape(smaller, model) == (shape[0], 32, 32)


def test_the_stride_of_a_vae(tmp_path: Path) -> None:
    assert vae_stride(None) == 8 and vae_stride(str(tmp_path)) == 8
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"encoder_block_out_channels": [8] * 6}))
    assert vae_stride(str(tmp_path)) == vae_stride(str(tmp_path / "vae")) == 32


# --- dry runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_neither_weights_nor_cache_are_needed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_only(name, tmp_path)

    def loaded(*_: object, **__: object) -> None:
        raise SafetensorError("weights are read")

    monkeypatch.setattr(ModelMixin, "from_pretrained", loaded)
    code, output, errors = command("distill", config, "--dry-run", *sets("train.num_processes=2"))
    assert code == 0, errors
    assert "operations and memory are counted; seconds are measured, in two steps on cpu" in errors
    figures = json.loads(output)
    assert figures["sample"] == [4, 8, 8]
    assert figures["condition"]["encoder_hidden_states"] == ([77, 16] if name == "sdxl" else [TEXT, 8])
    assert figures["operations_per_image"]["training"] > 3 * figures["operations_per_image"]["forward"]
    assert set(figures["measured"]["terms"]) == {"denoise", "output", "shd"}
    by_option = figures["memory_bytes_by_option"]
    assert by_option["gradient_checkpointing"] < by_option["plain"] == figures["memory_bytes"]["sum"]
    assert set(by_option) == {
        "plain", "plain, sharded", "gradient_checkpointing", "gradient_checkpointing, sharded",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "config.yaml"}


def test_what_does_not_fit_is_counted_and_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_only("flux-dev", tmp_path)
    monkeypatch.setattr("shd_diffusion.training.dry_run.SHARE_OF_MEMORY", 0.0)
    code, output, errors = command("distill", config, "--dry-run")
    assert code == 0, errors
    assert "and nothing is measured: a step of one image needs 0.0 GB, and" in errors
    figures = json.loads(output)
    assert figures["measured"] is None and figures["run"]["seconds_here"] is None
    assert figures["run"]["operations"] == 6 * figures["operations_per_image"]["training"]


def test_a_step_that_takes_long_is_for_an_accelerator() -> None:
    cpu: Any = SimpleNamespace(device=torch.device("cpu"))
    assert why_not_measured(1, 10**11, cpu) is None
    assert "too many for a CPU" in str(why_not_measured(1, 10**13, cpu))


def test_a_model_whose_prompts_are_unknown_needs_the_cache(tmp_path: Path) -> None:
    config = config_only("sdxl", tmp_path)
    shutil.rmtree(tmp_path / "teacher")
    PIPELINES["hunyuan-dit"]().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    tree = {**yaml.safe_load(config.read_text()), "student": {}}
    config.write_text(yaml.safe_dump(tree))
    code, _, errors = command("distill", config, "--dry-run")
    assert (
        code == 2 and "HunyuanDiT2DModel has no prompt that can be made up, so it needs the cache" in errors
    )
    assert str(tmp_path / "cache") in errors
