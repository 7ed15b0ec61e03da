"""What a logged step took."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shd_diffusion.run_folder import RunFolder
from shd_diffusion.training import metrics_logger
from shd_diffusion.training.metrics_logger import MetricsLogger


def test_what_is_no_step_is_in_no_steps_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of a second, a checkpoint of 100 seconds between them."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(metrics_logger, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    accelerator: Any = SimpleNamespace(reduce=lambda values, _: values)
    logger = MetricsLogger(RunFolder(tmp_path), accelerator, 4, 0)
    clock.now += 1
    with logger.apart():
        clock.now += 100
    clock.now += 1
    entry = logger.entry(2, {"denoise": torch.tensor(0.5)}, {"denoise": 1.0}, torch.tensor(1.0), 0.1, {})
    assert entry["seconds_per_step"] == 1.0
