"""A teacher with what its pipeline says of it: the process that it denoises, and the latent space that it works in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.models.denoiser import freeze
from shd_diffusion.models.factory import TeacherConfig, load_model
from shd_diffusion.models.forward_process import (
    DiffusionConfig,
    differing_settings,
    make_scheduler_of_process,
    settings_of,
    shifts_by_size,
)
from shd_diffusion.models.pipeline_folder import INDEX, PipelineFolder, find_pipeline


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and what lies beside it.

    Attributes:
        model: in evaluation mode, in the precision that it computes in.
        pipeline: that it is part of, which says all the rest; None where it is no part of one.
        scheduler: of its pipeline.
    """

    model: ModelMixin
    pipeline: PipelineFolder | None = None
    scheduler: SchedulerMixin | None = None


def load_teacher(config: TeacherConfig) -> Teacher:
    """The teacher of a config, in its precision, on the CPU.

    Raises:
        UserError: it cannot be loaded; see `load_model`.
    """
    dtype = None if config.dtype == "float32" else getattr(torch, config.dtype)
    model = freeze(load_model(config.path, dtype))
    pipeline = find_pipeline(config.path)
    try:
        return Teacher(model, pipeline, None if pipeline is None else pipeline.load_scheduler())
    except (TypeError, ValueError) as error:
        raise UserError(f"{config.path}: its {INDEX} is damaged ({one_line(error)})") from error


def scheduler_for(
    config: DiffusionConfig, scheduler: SchedulerMixin | None, learned_variance: bool
) -> SchedulerMixin:
    """The scheduler whose process a run trains in: that of a pipeline, or without one the config's.

    Raises:
        ValueError: the config sets a key otherwise than the pipeline; the message names both values.
    """
    if scheduler is None:
        return make_scheduler_of_process(config, learned_variance)
    for key, (wanted, present) in differing_settings(config, scheduler).items():
        raise ValueError(
            f"key `diffusion.{key}` is {wanted!r}, but the pipeline was trained with {present!r}; "
            "leave it out, or make it equal"
        )
    if config.shift is not None and shifts_by_size(scheduler):
        scheduler = type(scheduler).from_config({**scheduler.config, "shift": config.shift})
    predicted = scheduler.config.get("variance_type") in ("learned", "learned_range")
    if predicted == learned_variance or settings_of(scheduler)["objective"] == "flow":
        return scheduler
    # whether a variance is learned too is the student's own affair
    kind = "learned_range" if learned_variance else "fixed_small"
    return type(scheduler).from_config({**scheduler.config, "variance_type": kind})
