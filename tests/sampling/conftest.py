"""A finished run that was not trained, for tests of what is made of its pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from random_runs import finished_run, random_dit_pipeline

from shd_diffusion.sampling import ClassConditionalPipeline


@pytest.fixture
def random_pipeline() -> Callable[..., ClassConditionalPipeline]:
    return random_dit_pipeline


@pytest.fixture
def pipeline() -> ClassConditionalPipeline:
    return random_dit_pipeline()


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return finished_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")
