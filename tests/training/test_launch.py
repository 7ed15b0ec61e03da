"""What a launch is, told at its start."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.tracking import WandBTracker
from commands import DISTILL_CONFIG
from torch import nn

from shd_diffusion.config import DistillConfig, TrainConfig, read_config
from shd_diffusion.losses.term import TermConfig
from shd_diffusion.processes import processes
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.training.checks import check_scaled_gradients
from shd_diffusion.training.launch import describe_launch, describe_losses, start_trackers


def launched(count: int, device: str = "cpu") -> Any:
    return SimpleNamespace(num_processes=count, device=torch.device(device))


def test_a_launch_is_told() -> None:
    config = TrainConfig(max_steps=1, batch_size=32)
    assert describe_launch(launched(1), config) == "1 process on cpu, 32 images a step"
    assert describe_launch(launched(2, "cuda"), config) == "2 processes on cuda, 32 images a step"


def test_losses_are_told() -> None:
    """Those that have an option and no weight too."""
    configs = {
        "denoise": TermConfig(),
        "features": TermConfig(during=[0, 0.5]),
        "shd": TermConfig(weight=20, decay="cosine"),
    }
    terms: Any = {name: SimpleNamespace(config=config) for name, config in configs.items()}
    told = "losses: denoise 1, features 1 from 0% to 50%, shd 20 with cosine decay"
    assert describe_losses(terms) == told


def test_float16_does_not_scale_whole_gradients_beside_shards() -> None:
    whole: Any = {"output": nn.Identity(), "features": nn.Linear(2, 2)}
    none: Any = {"output": nn.Identity()}
    with pytest.raises(ValueError, match=r"`train\.mixed_precision`: fp16 .*`losses\.features`.*; set bf16"):
        check_scaled_gradients(whole, True, "fp16")
    for terms, shard, precision in ((none, True, "fp16"), (whole, False, "fp16"), (whole, True, "bf16")):
        check_scaled_gradients(terms, shard, precision)


def test_a_run_that_goes_on_is_the_same_one_on_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through accelerate's own tracker, to a stand-in for the package itself."""
    processes()  # accelerate's trackers write log lines, which need one
    config, begun = read_config(DISTILL_CONFIG, DistillConfig), list[dict[str, Any]]()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: begun.append(given)))

    def start(project: str, config: dict[str, Any], arguments: dict[str, Any]) -> None:
        WandBTracker(project, **arguments["wandb"]).start()

    accelerator: Any = SimpleNamespace(init_trackers=start)
    for name in ("one", "one", "two"):
        folder = RunFolder(tmp_path / name)
        folder.path.mkdir(exist_ok=True)
        folder.create(config, {})
        monkeypatch.setattr("shd_diffusion.run_folder.describe_environment", lambda: {"started": "later"})
        start_trackers(accelerator, config, folder)
    first, again, other = begun
    assert first == again and first["project"] == "shd-diffusion" and first["resume"] == "allow"
    assert [each["name"] for each in begun] == ["one", "one", "two"] and other["id"] != first["id"]
