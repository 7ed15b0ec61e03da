"""A cache folder that is not the user's, and a short run of every stage for tests of what a stage leaves behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import DISTILL_CONFIG, FEW_IMAGES, SHORT, TEACHER_CONFIG, command, sets

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of these tests: classifiers and references are made once for all their processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "cache"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "shd-diffusion"


@pytest.fixture(scope="session")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `teacher` and `kd-shd` of 20 steps each, sampled and evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    teacher, student = folder / "teacher", folder / "kd-shd"
    assert command("train-teacher", TEACHER_CONFIG, "--output", teacher, *sets(*SHORT))[0] == 0
    overrides = sets(*SHORT, f"teacher.path={teacher}")
    assert command("distill", DISTILL_CONFIG, "--output", student, *overrides)[0] == 0
    assert command("sample", teacher, student, *sets(*FEW_IMAGES))[0] == 0
    assert command("evaluate", teacher, student)[0] == 0
    return folder
