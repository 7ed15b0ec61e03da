"""A checkpoint as a run of its own: what a run that goes on, or was stopped, has by then, to be looked at."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from safetensors.torch import load_file

from shd_diffusion.errors import UserError
from shd_diffusion.files import locked, read_as, replacing_folder, write_json
from shd_diffusion.model_card import write_card
from shd_diffusion.processes import processes
from shd_diffusion.run_folder import RunFolder, as_step, checkpoint_steps
from shd_diffusion.training.checkpoints import CheckpointFolder, checkpoint_path
from shd_diffusion.training.run import (
    open_run,
    place_models,
    take_teacher_of,
    to_look_at,
    try_attention_maps,
    write_pipeline,
)
from shd_diffusion.training.train_state import scatter


def export_checkpoint(run: RunFolder, checkpoint: str) -> RunFolder:
    """The averaged weights of a checkpoint as a finished run in `steps/` of its run; what is there already stays.

    Neither the run nor its pipeline changes, and it may be training meanwhile.

    Args:
        checkpoint: a step, or `latest`.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or what the run reads is missing or has changed.
    """
    config = run.read_config()
    wanted = None if checkpoint == "latest" else as_step(checkpoint)
    steps = checkpoint_steps(run.checkpoints)
    if not steps:
        raise UserError(f"{run.path}: --checkpoint {checkpoint}: has no checkpoints")
    step = steps[-1] if wanted is None else wanted
    if run.at_step(step).summary_file.exists():
        return run.at_step(step)
    if step not in steps:
        raise UserError(
            f"{run.path}: --checkpoint {checkpoint}: there is no such checkpoint; there are those of steps "
            f"{', '.join(map(str, steps))}"
        )
    opened = open_run(to_look_at(config), run, str(run.config_file))
    present = CheckpointFolder(run.checkpoints, run.identity(config), opened.accelerator, keep_last=1)
    if wanted is None:
        step = present.latest(config.train.max_steps)
    if damage := present.find_damage(checkpoint_path(run.checkpoints, step), config.train.max_steps):
        raise UserError(f"{checkpoint_path(run.checkpoints, step)}: {damage}; choose another --checkpoint")
    model, place = opened.parts.model, run.at_step(step)
    _load_average(model, checkpoint_path(run.checkpoints, step))
    state = processes()
    state.wait_for_everyone()  # until all have seen what there is
    with locked(place.path.parent, state):
        if state.is_main_process:
            with replacing_folder(place.path) as temporary:
                folder = RunFolder(temporary)
                folder.write_config(config)
                write_json(temporary / "environment.json", _environment(run, step))
                for file in (run.metrics_file, run.merge_plans_file, run.inputs_file):
                    if file.exists():
                        shutil.copyfile(file, temporary / file.name)
                folder.forget_after(step)
                write_pipeline(opened, folder, f"{run.path.name} at step {step}", model, step)
            write_card(place)
    take_teacher_of(checkpoint_path(run.checkpoints, step), opened.parts)
    place_models(opened.parts, opened.accelerator)
    try_attention_maps(place, opened.parts, model, None)
    state.wait_for_everyone()
    return place


def _load_average(model: ModelMixin, path: Path) -> None:
    """Put the averaged parameters of a checkpoint into a model, with the buffers as they were."""
    scatter(load_file(path / "ema.safetensors"), {str(i): p for i, p in enumerate(model.parameters())})
    scatter(load_file(path / "model.safetensors"), dict(model.named_buffers()))
    model.eval()


def _environment(run: RunFolder, step: int) -> dict[str, Any]:
    """That of the training, with the commands that lead here."""
    trained = read_as(run.environment_file, dict[str, Any])
    return trained | {
        "command": f"{trained.get('command')}\nshd-diffusion sample {run.path} --checkpoint {step}"
    }
