"""Checkpoints that are whole or absent: `checkpoints/step-00000600/` with all that a run goes on from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from shd_diffusion.files import read_json, replacing_folder, write_json


class Stateful(Protocol):
    """What a method keeps between steps, as named tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of which there is a checkpoint, in ascending order."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def latest_checkpoint(folder: Path) -> int:
    """The last step of which there is a checkpoint; 0 if there is none."""
    return max(checkpoint_steps(folder), default=0)


def save_checkpoint(
    folder: Path, step: int, accelerator: Accelerator, ema: EMAModel, method: Stateful, keep_last: int
) -> None:
    """Write the checkpoint of a step, then delete all but the last few. Every process calls this.

    Args:
        folder: the run's `checkpoints`.
        step: how many steps have been taken.
        accelerator: has prepared the model, the optimiser and the schedule.
        ema: the averaged weights.
        method: keeps what else the loss remembers.
        keep_last: how many checkpoints stay.
    """
    path = _path(folder, step)
    with replacing_folder(path, accelerator) as temporary:
        accelerator.save_state(str(temporary), safe_serialization=True)
        if accelerator.is_main_process:
            save_file(
                {str(i): p.contiguous() for i, p in enumerate(ema.shadow_params)},
                temporary / "ema.safetensors",
            )
            save_file(method.state_dict(), temporary / "method.safetensors")
            write_json(temporary / "step.json", {"step": step, "ema_step": ema.optimization_step})
    if accelerator.is_main_process:
        for old in checkpoint_steps(folder)[:-keep_last]:
            shutil.rmtree(_path(folder, old))


def load_checkpoint(
    folder: Path, step: int, accelerator: Accelerator, ema: EMAModel, method: Stateful
) -> None:
    """Put everything back as it was after `step` steps. Every process calls this."""
    path = _path(folder, step)
    accelerator.load_state(str(path))
    averaged = load_file(path / "ema.safetensors", device=str(accelerator.device))
    with torch.no_grad():
        for i, parameter in enumerate(ema.shadow_params):
            parameter.copy_(averaged[str(i)])
    ema.optimization_step = read_json(path / "step.json")["ema_step"]
    method.load_state_dict(load_file(path / "method.safetensors", device=str(accelerator.device)))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"
