"""A teacher with what its pipeline says of it: the process that it denoises, and the latent space that it works in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import read_json
from shd_diffusion.models.denoiser import freeze
from shd_diffusion.models.factory import TeacherConfig, find_model_folder, load_model
from shd_diffusion.models.forward_process import (
    DiffusionConfig,
    differing_settings,
    make_scheduler_of_process,
    settings_of,
)


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and what lies beside it.

    Attributes:
        model: in evaluation mode, in the precision that it computes in.
        scheduler: of its pipeline; None where the model is no part of one.
        vae: where its pipeline's VAE can be loaded from; None where it works on pixels, or is no part of a pipeline.
        in_pipeline: whether it is part of a pipeline, which then says all of this.
        sample_shape: (C, H, W) of what it was trained on, where its pipeline says it.
    """

    model: ModelMixin
    scheduler: SchedulerMixin | None = None
    vae: str | None = None
    in_pipeline: bool = False
    sample_shape: tuple[int, ...] | None = None


def load_teacher(config: TeacherConfig) -> Teacher:
    """The teacher of a config, in its precision, on the CPU.

    Raises:
        UserError: it cannot be loaded; see `load_model`.
    """
    dtype = None if config.dtype == "float32" else getattr(torch, config.dtype)
    model = freeze(load_model(config.path, dtype))
    folder = find_model_folder(Path(config.path))
    place = str(folder.parent) if folder is not None else config.path
    try:
        index = _index(folder, config.path)
        if index is None:
            return Teacher(model)
        scheduler = None
        if kind := getattr(diffusers, str((index.get("scheduler") or [None, ""])[1]), None):
            scheduler = kind.from_pretrained(place, subfolder="scheduler")
        has_vae = bool((index.get("vae") or [None])[0])
        shape = index.get("sample_shape")
        sample_shape = None if shape is None else tuple(int(size) for size in shape)
        return Teacher(
            model, scheduler, place if has_vae else None, in_pipeline=True, sample_shape=sample_shape
        )
    except UserError:
        raise
    except Exception as error:  # diffusers raises errors of any kind on damaged files
        raise UserError(f"{config.path}: its scheduler cannot be loaded ({one_line(error)})") from error


def _index(folder: Path | None, name: str) -> dict[str, Any] | None:
    """The model_index.json of the pipeline around a model; None if there is none."""
    if folder is None:
        return dict(diffusers.DiffusionPipeline.load_config(name))
    file = folder.parent / "model_index.json"
    return read_json(file) if file.is_file() else None


def scheduler_for(config: DiffusionConfig, teacher: Teacher | None, learned_variance: bool) -> SchedulerMixin:
    """The scheduler whose process a run trains in: the teacher's, or without one the config's.

    Raises:
        ValueError: the config sets a key otherwise than the teacher's pipeline; the message names both values.
    """
    if teacher is None or teacher.scheduler is None:
        return make_scheduler_of_process(config, learned_variance)
    for key, (wanted, present) in differing_settings(config, teacher.scheduler).items():
        raise ValueError(
            f"key `diffusion.{key}` is {wanted!r}, but the teacher was trained with {present!r}; "
            "leave it out, or make it equal"
        )
    scheduler = teacher.scheduler
    predicted = scheduler.config.get("variance_type") in ("learned", "learned_range")
    if predicted == learned_variance or settings_of(scheduler)["objective"] == "flow":
        return scheduler
    # whether a variance is learned too is the student's own affair
    kind = "learned_range" if learned_variance else "fixed_small"
    return type(scheduler).from_config({**scheduler.config, "variance_type": kind})
