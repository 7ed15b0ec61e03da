"""A whole small run of every stage, made once for all tests that look at what a stage leaves behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from commands import DISTILL_CONFIG, FEW_IMAGES, SHORT, TEACHER_CONFIG, command, sets

os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
