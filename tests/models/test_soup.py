"""The mean of the weights of several models: what it is, which can have one, and a run that saves it as it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import DISTILL_CONFIG, command, sets
from diffusers import DiTTransformer2DModel
from safetensors.numpy import load_file
from small_models import small_dit

from shd_diffusion.errors import UserError
from shd_diffusion.models.factory import ModelConfig, build_model
from shd_diffusion.run_folder import RunFolder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three models of one kind."""
    places = [tmp_path / name for name in "abc"]
    for number, place in enumerate(places):
        torch.manual_seed(number)
        small_dit(3).save_pretrained(place)
    return places


def test_a_run_of_no_steps_saves_the_mean(folders: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = [
        "student={class: null, pretrained: [" + ", ".join(map(str, folders)) + "]}",
        f"teacher.path={folders[0]}",
        "train.max_steps=0",
    ]
    assert command("distill", DISTILL_CONFIG, "--output", run, *sets(*overrides))[0] == 0
    assert RunFolder(run).read_summary().steps == 0
    (place,) = (run / "pipeline").glob(f"*/{WEIGHTS}")
    found, given = load_file(place), [load_file(folder / WEIGHTS) for folder in folders]
    assert found.keys() == given[0].keys()
    for name, weight in found.items():
        expected = np.mean([each[name].astype(np.float64) for each in given], 0)
        np.testing.assert_array_equal(weight, expected.astype(weight.dtype))  # summed in float64, too
    code, _, said = command("distill", DISTILL_CONFIG, "--output", folders[1] / "x", *sets(*overrides))
    assert code == 2 and "`student.pretrained.1`" in said


def test_models_of_other_shapes_have_none(folders: list[Path], tmp_path: Path) -> None:
    small_dit(2).save_pretrained(tmp_path / "other")
    with pytest.raises(
        UserError, match=rf"{tmp_path}/other: its weights have other shapes than those of {folders[0]}"
    ):
        build_model(ModelConfig(pretrained=[str(folders[0]), str(tmp_path / "other")]))


def test_heads_of_another_width_have_none(folders: list[Path], tmp_path: Path) -> None:
    """As many channels, and weights of the same shapes."""
    config = small_dit(3).config
    config = {**config, "num_attention_heads": 6, "attention_head_dim": config.attention_head_dim // 2}
    DiTTransformer2DModel.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="/other: its `num_attention_heads` is another than that of"):
        build_model(ModelConfig(pretrained=[str(folders[0]), str(tmp_path / "other")]))
