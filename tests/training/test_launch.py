"""What a launch is, told at its start."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shd_diffusion.config import TrainConfig
from shd_diffusion.training.launch import describe_launch


def launched(count: int, device: str = "cpu") -> Any:
    return SimpleNamespace(num_processes=count, device=torch.device(device))


def test_a_launch_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(sys, "argv", ["pipelines/distill.py", "my config.yaml"])
    config = TrainConfig(max_steps=1, batch_size=32)
    assert describe_launch(launched(1), config) == "1 process on cpu, 32 images a step"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # accelerate's launcher sets it
    assert describe_launch(launched(2), config) == "2 processes on cpu, 32 images a step"
    assert describe_launch(launched(1, "cuda"), config) == "1 process on cuda, 32 images a step"
    told = describe_launch(launched(1), config)
    assert told.endswith("type: torchrun --nproc_per_node N pipelines/distill.py 'my config.yaml'")
