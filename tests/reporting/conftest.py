"""Run folders and a page of them for the tests of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from shd_diffusion.reporting import write_report

from .made_up_runs import FIDS, make_run
from .made_up_text_runs import make_text_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher and three students, complete."""
    root = tmp_path_factory.mktemp("runs")
    return {name: make_run(root / name, fid) for name, fid in FIDS.items()}


@pytest.fixture
def fresh_run(tmp_path: Path) -> Callable[..., Path]:
    """Make a run of one's own, to be damaged."""
    return lambda name, **kwargs: make_run(tmp_path / "runs" / name, FIDS.get(name, 200.0), **kwargs)


@pytest.fixture(scope="session")
def report(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of all four runs."""
    return write_report(list(runs.values()), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="session")
def text_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A text-to-image teacher and two students, one of which lacks an image."""
    root = tmp_path_factory.mktemp("text-runs")
    noises = {"kd": 0.3, "kd-shd": 0.1, "teacher": 0.0}
    runs = [make_text_run(root / name, noise) for name, noise in noises.items()]
    (runs[0] / "samples" / "000004.png").unlink()
    return runs


@pytest.fixture(scope="session")
def text_report(text_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of text-to-image runs, with hostile prompts among others."""
    return write_report(text_runs, tmp_path_factory.mktemp("text-report") / "report.html")
