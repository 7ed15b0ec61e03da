"""Checkpoints that are whole or absent: `checkpoints/step-00000600/` with all that a run goes on from."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shd_diffusion.errors import UserError
from shd_diffusion.files import read_json, replacing_folder, write_json
from shd_diffusion.progress import announce
from shd_diffusion.training.state import Training

MANIFEST = "manifest.json"


class Stateful(Protocol):
    """What a method keeps between steps, as named tensors."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of which there is a checkpoint, in ascending order."""
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def latest_checkpoint(folder: Path, accelerator: Accelerator) -> int:
    """The last step of which there is an undamaged checkpoint; 0 if there is none. Every process calls this."""
    found = [0]
    if accelerator.is_main_process:
        for step in reversed(checkpoint_steps(folder)):
            if damage := find_damage(checkpoint_path(folder, step)):
                announce(
                    f"{checkpoint_path(folder, step)}: damaged ({damage}); using the checkpoint before it"
                )
            else:
                found = [step]
                break
    return broadcast_object_list(found)[0]


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is as it was written."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
    except (UserError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    for name, digest in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _digest(checkpoint / name) != digest:
            return f"{name} has changed"
    return None


def save_checkpoint(
    folder: Path,
    step: int,
    training: Training,
    method: Stateful,
    accelerator: Accelerator,
    keep_last: int,
    keep_every: int = 0,
) -> None:
    """Write the checkpoint of a step, then delete older ones. Every process calls this.

    Tensors are whole, whatever the number of processes: a safetensors file each for the model, its average, the
    optimiser and the method, and a manifest with the plain values and every file's hash.

    Args:
        folder: the run's `checkpoints`.
        step: how many steps have been taken.
        training: what changes while the run trains.
        method: keeps what else the loss remembers.
        accelerator: of the run.
        keep_last: so many of the last checkpoints stay.
        keep_every: those of every so many steps stay too; 0 for none.

    Raises:
        UserError: it could not be written, for want of space perhaps; the checkpoints before it are whole.
    """
    path, main = checkpoint_path(folder, step), accelerator.is_main_process
    tensors = training.tensors(keep=main) | {"method": method.state_dict()}
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
    if main:
        try:
            with replacing_folder(path) as temporary:
                for name, part in tensors.items():
                    save_file(part, temporary / f"{name}.safetensors")
                files = {file.name: _digest(file) for file in temporary.iterdir()}
                content = {"step": step, "values": training.values(), "scaler": scaler, "files": files}
                write_json(temporary / MANIFEST, content)
        except (OSError, SafetensorError) as error:
            kept = checkpoint_steps(folder)
            raise UserError(
                f"{path}: cannot be written ({' '.join(str(error).split())}); is the disk full? "
                f"The same command goes on from step {kept[-1] if kept else 0}"
            ) from error
        for old in checkpoint_steps(folder)[:-keep_last]:
            if not (keep_every and old % keep_every == 0):
                shutil.rmtree(checkpoint_path(folder, old))
    accelerator.wait_for_everyone()


def load_checkpoint(
    folder: Path, step: int, training: Training, method: Stateful, accelerator: Accelerator
) -> None:
    """Put everything back as it was after `step` steps. Every process calls this."""
    path = checkpoint_path(folder, step)
    manifest = read_json(path / MANIFEST)
    names = ("model", "average", "optimizer")
    training.restore({name: load_file(path / f"{name}.safetensors") for name in names}, manifest["values"])
    method.load_state_dict(load_file(path / "method.safetensors"))
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(manifest["scaler"])


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
