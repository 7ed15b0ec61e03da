"""A finished run that was not trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from random_runs import finished_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finished_run(tmp_path / "run")
