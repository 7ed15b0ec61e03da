"""Checkpoints that are whole or absent: `checkpoints/step-00000600/` with all that a run goes on from.

manifest.json            the step, the run, plain values, every file's hash, and the hash of all that
model.safetensors        weights and buffers
ema.safetensors          their average
optimizer.safetensors    AdamW's moments
loss.safetensors         parameters of the loss, and of a teacher that trains too
"""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import json_sha256, read_json, replacing_folder, save_tensors, sha256, write_json
from shd_diffusion.processes import by_main_process
from shd_diffusion.progress import announce
from shd_diffusion.run_folder import checkpoint_steps
from shd_diffusion.training.train_state import TrainState, gather, scatter

MANIFEST = "manifest.json"


class CheckpointFolder:
    """The checkpoints of one run. Every process calls its methods.

    Args:
        folder: the run's `checkpoints`.
        run: what identifies the run; a checkpoint of another is no checkpoint of this one.
        accelerator: of the run.
        keep_last: so many of the last checkpoints stay.
        keep_every: those of every so many steps stay too; 0 for none.
    """

    def __init__(
        self, folder: Path, run: str, accelerator: Accelerator, keep_last: int, keep_every: int = 0
    ) -> None:
        self.folder, self.run, self.accelerator = folder, run, accelerator
        self.keep_last, self.keep_every = keep_last, keep_every

    def latest(self, max_steps: int) -> int:
        """The last step, at most `max_steps`, of which there is an undamaged checkpoint; 0 if there are no checkpoints.

        Raises:
            UserError: there are some, but none can be used.
        """
        return by_main_process(lambda: self._latest(max_steps))

    def _latest(self, max_steps: int) -> int:
        steps = checkpoint_steps(self.folder)
        for step in reversed(steps):
            path = checkpoint_path(self.folder, step)
            if (damage := self.find_damage(path, max_steps)) is None:
                return step
            if step == steps[0]:
                raise UserError(
                    f"{path}: {damage}, and no other checkpoint can be used; give another --output, or delete "
                    f"{self.folder} to begin anew"
                )
            announce(f"{path}: {damage}; using the checkpoint before it")
        return 0

    def find_damage(self, path: Path, max_steps: int) -> str | None:
        """What is wrong with a checkpoint; None if it is as it was written, in this run."""
        try:
            manifest = read_json(path / MANIFEST)
            digest = manifest.pop("sha256")
        except (UserError, KeyError, AttributeError, TypeError):
            return f"damaged ({MANIFEST} is missing or cannot be read)"
        if digest != json_sha256(manifest):
            return f"damaged ({MANIFEST} has changed)"
        if manifest["run"] != self.run:
            return "of another run"
        if path != checkpoint_path(self.folder, manifest["step"]):
            return f"renamed, it is that of step {manifest['step']}"
        if manifest["step"] > max_steps:
            return f"beyond the last of {max_steps} steps"
        for name, digest in manifest["files"].items():
            if not (path / name).is_file():
                return f"damaged ({name} is missing)"
            if sha256(path / name) != digest:
                return f"damaged ({name} has changed)"
        return None

    def save(self, step: int, state: TrainState, loss: nn.Module) -> None:
        """Write the checkpoint of a step, then delete older ones.

        Tensors are whole, whatever the number of processes.

        Raises:
            UserError: it could not be written, for want of space perhaps; the checkpoints before it are whole.
        """
        path, main = checkpoint_path(self.folder, step), self.accelerator.is_main_process
        tensors = state.tensors(keep=main) | {"loss": gather(loss.state_dict(), keep=main)}
        scaler = self.accelerator.scaler
        if main:
            try:
                with replacing_folder(path) as temporary:
                    for name, part in tensors.items():
                        save_tensors(part, temporary / f"{name}.safetensors")
                    manifest = {
                        "step": step,
                        "run": self.run,
                        "values": state.values(),
                        "scaler": scaler.state_dict() if scaler else {},
                        "files": {file.name: sha256(file) for file in temporary.iterdir()},
                    }
                    write_json(temporary / MANIFEST, {**manifest, "sha256": json_sha256(manifest)})
            except OSError as error:
                kept = checkpoint_steps(self.folder)
                raise UserError(
                    f"{path}: cannot be written ({one_line(error)}); is the disk full? "
                    f"The same command goes on from step {kept[-1] if kept else 0}"
                ) from error
            self._delete_old()
        self.accelerator.wait_for_everyone()

    def load(self, step: int, state: TrainState, loss: nn.Module) -> None:
        """Put everything back as it was after `step` steps, and forget what is said to come later."""
        path = checkpoint_path(self.folder, step)
        manifest = read_json(path / MANIFEST)
        names = ("model", "ema", "optimizer")
        state.restore({name: load_file(path / f"{name}.safetensors") for name in names}, manifest["values"])
        scatter(load_file(path / "loss.safetensors"), loss.state_dict())
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(manifest["scaler"])
        if self.accelerator.is_main_process:  # damaged ones would count among the last that stay
            for later in checkpoint_steps(self.folder):
                if later > step:
                    shutil.rmtree(checkpoint_path(self.folder, later))

    def _delete_old(self) -> None:
        for old in checkpoint_steps(self.folder)[: -self.keep_last]:
            if not (self.keep_every and old % self.keep_every == 0):
                shutil.rmtree(checkpoint_path(self.folder, old))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"
