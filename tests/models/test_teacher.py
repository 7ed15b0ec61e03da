"""Teachers from folders, whole and damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from small_models import small_dit

from shd_diffusion.errors import UserError
from shd_diffusion.models.factory import TeacherConfig
from shd_diffusion.models.teacher import load_teacher

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A folder as diffusers saves a pipeline of a DiT and a DDIM scheduler."""
    folder = tmp_path / "pipeline"
    small_dit(2).save_pretrained(folder / "transformer")
    DDIMScheduler(500, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    parts = {
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **parts}))
    return folder


def test_a_pipeline_says_its_process(pipeline: Path) -> None:
    teacher = load_teacher(TeacherConfig(path=str(pipeline)))
    assert isinstance(teacher.model, DiTTransformer2DModel) and not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert (
        isinstance(teacher.scheduler, DDIMScheduler) and teacher.pipeline and not teacher.pipeline.has("vae")
    )
    assert teacher.scheduler.config["num_train_timesteps"] == 500
    saved = load_file(pipeline / WEIGHTS)
    assert all(torch.equal(value, saved[name]) for name, value in teacher.model.state_dict().items())


def test_a_pipeline_with_a_vae_says_where_it_lies(pipeline: Path) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}))
    around = load_teacher(TeacherConfig(path=str(pipeline))).pipeline
    assert around is not None and around.has("vae") and around.name == str(pipeline)


def test_a_model_folder_says_nothing_else(tmp_path: Path) -> None:
    small_dit(2).save_pretrained(tmp_path / "model")
    teacher = load_teacher(TeacherConfig(path=str(tmp_path / "model"), dtype="bfloat16"))
    assert (teacher.scheduler, teacher.pipeline) == (None, None)
    assert teacher.model.dtype == torch.bfloat16


def says(path: Path) -> str:
    """The one line in which loading fails, after the path that was given."""
    with pytest.raises(UserError) as raised:
        load_teacher(TeacherConfig(path=str(path)))
    message = str(raised.value)
    assert "\n" not in message and message.startswith(str(path))
    return message.removeprefix(str(path))


def test_a_missing_folder(tmp_path: Path) -> None:
    assert "no model here" in says(tmp_path / "nowhere")


def written(file: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_text(text) and None


def with_keys(**keys: Any) -> Callable[[Path], None]:
    """The model's config with other values."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | keys))

    return damage


def with_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return damage


def cut(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "config cut": written(CONFIG, '{"_class_name": "DiTTr'),
    "config a list": written(CONFIG, "[]"),
    "class null": with_keys(_class_name=None),
    "class a list": with_keys(_class_name=["DiTTransformer2DModel"]),
    "class unknown": with_keys(_class_name="Nothing"),
    "class no model": with_keys(_class_name="DDIMScheduler"),
    "no heads": with_keys(num_attention_heads=0),
    "negative heads": with_keys(num_attention_heads=-1),
    "heads a string": with_keys(num_attention_heads="12"),
    "other heads": with_keys(num_attention_heads=3),
    "no size": with_keys(sample_size=0),
    "unknown activation": with_keys(activation_fn="nothing"),
    "quantised": with_keys(quantization_config={"quant_method": "nothing"}),
    "weights cut": cut,
    "weights gone": lambda folder: (folder / WEIGHTS).unlink(),
    "a weight lacks": with_weights(lambda weights: weights.pop("proj_out_2.weight")),
    "a weight is NaN": with_weights(lambda weights: weights["proj_out_2.weight"].fill_(torch.nan)),
    "another shape": with_weights(lambda weights: weights.update({"proj_out_2.weight": torch.zeros(3, 3)})),
    "weights of an index": lambda folder: (
        (folder / WEIGHTS).unlink(),
        (folder / f"{WEIGHTS}.index.json").write_text("{}"),
    ),
    "index cut": written("model_index.json", "{"),
    "index a list": written("model_index.json", "[]"),
    "index of no parts": written("model_index.json", '{"scheduler": null, "vae": 3}'),
    "scheduler cut": written("scheduler/scheduler_config.json", "{"),
    "scheduler gone": lambda folder: (folder / "scheduler/scheduler_config.json").unlink(),
    "scheduler of other values": written("scheduler/scheduler_config.json", '{"beta_schedule": "nothing"}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(damage: str, pipeline: Path) -> None:
    DAMAGES[damage](pipeline)
    assert len(says(pipeline)) > 10
