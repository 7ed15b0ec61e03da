"""What is in memory while a text-to-image model trains, in which precision, and that less of it trains alike."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
import transformers
from config_only import config_only
from diffusers import AutoencoderKL, ModelMixin
from families_with_conditions import TAUGHT
from test_text_to_image import write_config, write_images
from tiny_pipelines import PIPELINES
from torch import Tensor

from shd_diffusion.config import DistillConfig, read_config, read_prepare_config
from shd_diffusion.data.prepare import prepare
from shd_diffusion.models.factory import ModelConfig, TeacherConfig, cast, empty_model
from shd_diffusion.models.teacher import load_teacher
from shd_diffusion.training import loop
from shd_diffusion.training.count import made_up_batch, materialised, training_loss
from shd_diffusion.training.dry_run import build_empty
from shd_diffusion.training.run import train


def test_neither_text_encoders_nor_vae_are_in_memory_while_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "images")
    PIPELINES["sd3"]().save_pretrained(tmp_path / "teacher", safe_serialization=True)
    path = write_config("sd3", tmp_path, tmp_path / "teacher")
    gc.collect()
    alive: WeakSet[torch.nn.Module] = WeakSet()
    made: set[str] = set()
    in_steps: list[set[str]] = []

    def watch(kind: type[torch.nn.Module]) -> None:
        constructor = kind.__init__

        def noted(self: torch.nn.Module, *arguments: Any, **keywords: Any) -> None:
            constructor(self, *arguments, **keywords)
            alive.add(self)
            made.add(type(self).__name__)

        monkeypatch.setattr(kind, "__init__", noted)

    def step(*arguments: Any, **keywords: Any) -> Any:
        gc.collect()
        in_steps.append({type(model).__name__ for model in alive})
        return take_step(*arguments, **keywords)

    take_step = loop.take_step
    monkeypatch.setattr(loop, "take_step", step)
    for kind in (ModelMixin, transformers.PreTrainedModel):
        watch(kind)
    config = read_config(path, DistillConfig)
    prepare(read_prepare_config(path), tmp_path / "cache", str(path))
    assert {"CLIPTextModelWithProjection", "T5EncoderModel", AutoencoderKL.__name__} < made
    train(config, tmp_path / "run", str(path))
    assert in_steps == [{"SD3Transformer2DModel"}] * 3


def test_a_bf16_teacher_keeps_in_float32_what_its_class_says(tmp_path: Path) -> None:
    model = TAUGHT["Wan"].build(2)
    kept = set(model._keep_in_fp32_modules)
    model.save_pretrained(tmp_path)
    teacher = load_teacher(TeacherConfig(path=str(tmp_path), dtype="bfloat16")).model
    found = {name: parameter.dtype for name, parameter in teacher.named_parameters()}
    assert found == {name: torch.float32 if kept & set(name.split(".")) else torch.bfloat16 for name in found}
    assert {torch.float32, torch.bfloat16} == set(found.values())
    counted = cast(empty_model(ModelConfig(pretrained=str(tmp_path))), torch.bfloat16)
    assert found == {name: parameter.dtype for name, parameter in counted.named_parameters()}


@pytest.mark.parametrize("name", ["sd1.5", "pixart-sigma", "sd3.5", "flux-dev"])
def test_checkpointing_changes_no_gradient(name: str, tmp_path: Path) -> None:
    parts = build_empty(read_config(config_only(name, tmp_path), DistillConfig), "config")
    device = torch.device("cpu")
    torch.manual_seed(0)
    parts = materialised(parts, device)
    batch = made_up_batch(parts, 2, device)
    loss = training_loss(parts)

    def gradients() -> dict[str, Tensor]:
        parts.model.train().zero_grad()
        with loss:
            torch.stack(list(loss(parts.model, batch, 0).values())).sum().backward()
        return {name: p.grad.clone() for name, p in parts.model.named_parameters() if p.grad is not None}

    plain = gradients()
    parts.model.enable_gradient_checkpointing()
    again = gradients()
    assert plain.keys() == again.keys() and any(gradient.any() for gradient in plain.values())
    for parameter, gradient in plain.items():
        assert torch.equal(again[parameter], gradient), parameter
