"""What a launch is, told at its start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from shd_diffusion.config import TrainConfig
from shd_diffusion.training.launch import describe_launch


def launched(count: int, device: str = "cpu") -> Any:
    return SimpleNamespace(num_processes=count, device=torch.device(device))


def test_a_launch_is_told() -> None:
    config = TrainConfig(max_steps=1, batch_size=32)
    assert describe_launch(launched(1), config) == "1 process on cpu, 32 images a step"
    assert describe_launch(launched(2, "cuda"), config) == "2 processes on cuda, 32 images a step"
