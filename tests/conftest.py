"""A whole small run of every stage, made once for all tests that look at what a stage leaves behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[1]
TEACHER_CONFIG = ROOT / "configs" / "digits" / "teacher.yaml"
DISTILL_CONFIG = ROOT / "configs" / "digits" / "distill.yaml"
SHORT = ["train.max_steps=20", "train.batch_size=16", "train.checkpoint_every=10", "train.log_every=5"]
FEW_IMAGES = ["sample.num_images=24", "sample.num_inference_steps=3"]

Command = Callable[..., tuple[int, str, str]]


def sets(*overrides: str) -> list[str]:
    """Overrides as arguments of the command line."""
    return [part for override in overrides for part in ("--set", override)]


def command(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output, standard error."""
    from typer.testing import CliRunner

    from shd_diffusion.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `teacher` and `kd-shd` of 20 steps each, sampled and evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    teacher, student = folder / "teacher", folder / "kd-shd"
    assert command("train-teacher", TEACHER_CONFIG, "--output", teacher, *sets(*SHORT))[0] == 0
    overrides = sets(*SHORT, f"teacher.path={teacher}")
    assert command("distill", DISTILL_CONFIG, "--output", student, *overrides)[0] == 0
    assert command("sample", teacher, student, *sets(*FEW_IMAGES))[0] == 0
    assert command("evaluate", teacher, student)[0] == 0
    return folder
