"""Sampling schedulers by name, on the forward process that a model was trained in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.models.forward_process import settings_of


def make_scheduler(name: str, arguments: dict[str, Any], trained_with: SchedulerMixin) -> SchedulerMixin:
    """A diffusers scheduler by its class name, on the noise schedule that the model was trained with.

    Raises:
        ValueError: diffusers has no scheduler of that name, or not without another library; it takes no such
            argument, or no such value; or it samples models of another objective.
    """
    kind: Any = getattr(diffusers, name, None)
    try:
        if not (hasattr(kind, "set_timesteps") and hasattr(kind, "step")):
            raise ValueError(f"`{name}` is no scheduler class of diffusers {diffusers.__version__}")
    except ImportError as error:  # diffusers' stand-in for a class whose library is missing
        raise ValueError(one_line(error)) from error
    parameters = inspect.signature(kind.__init__).parameters
    for key, value in arguments.items():
        if key not in parameters or key == "self":
            raise ValueError(f"`{name}` takes no argument `{key}`")
        if not _is_like(value, parameters[key].default):
            raise ValueError(f"`{name}` takes no {key}={value!r}; its default is {parameters[key].default!r}")
    if "variance_type" in parameters and not issubclass(kind, DDPMScheduler):
        # only DDPM draws with the variance that a model has learned
        arguments = {"variance_type": None, **arguments}
    try:
        scheduler = kind.from_config(trained_with.config, **arguments)
    except Exception as error:  # constructors compute with what they are given
        raise ValueError(f"`{name}` refuses its arguments: {one_line(error)}") from error
    predicted, wanted = (settings_of(each)["objective"] for each in (trained_with, scheduler))
    if predicted != wanted:
        raise ValueError(
            f"the model predicts `{predicted}`, which `{name}` does not sample by but `{wanted}`; "
            f"take {type(trained_with).__name__} or its kin"
        )
    return scheduler


def usual_scheduler(
    config: SampleConfig, trained_with: SchedulerMixin, in_pixels: bool = False
) -> SchedulerMixin:
    """The scheduler that a pipeline is made with: the config's, else DDIM, or Euler for a flow; as `make_scheduler`.

    Args:
        in_pixels: what it predicts at each step is an image in [-1, 1], and clipped unless the config says otherwise.
    """
    is_flow = settings_of(trained_with)["objective"] == "flow"
    usual = "FlowMatchEulerDiscreteScheduler" if is_flow else "DDIMScheduler"
    name = config.scheduler or usual
    clip = config.clip if config.clip is not None or not in_pixels else True
    return make_scheduler(name, _clipping(name, clip) | config.scheduler_arguments, trained_with)


def own_scheduler(config: SampleConfig, present: SchedulerMixin) -> SchedulerMixin:
    """The scheduler that a pipeline is sampled with: its own, unless the config says otherwise; as `make_scheduler`."""
    if config.scheduler is None and not config.scheduler_arguments and config.clip is None:
        return present
    name = config.scheduler or type(present).__name__
    return make_scheduler(name, _clipping(name, config.clip) | config.scheduler_arguments, present)


def scheduler_protocol(scheduler: SchedulerMixin) -> dict[str, Any]:
    """What a protocol tells of a scheduler beside the config; that it does not clip is not told, as it never was."""
    clips = _can_clip(type(scheduler)) and scheduler.config["clip_sample"]
    return {"scheduler": type(scheduler).__name__, **({"clip": True} if clips else {})}


def _clipping(name: str, clip: bool | None) -> dict[str, Any]:
    """What a scheduler that can clip is told; nothing where nobody says, or by one that cannot."""
    return {} if clip is None or not _can_clip(getattr(diffusers, name, None)) else {"clip_sample": clip}


def _can_clip(kind: Any) -> bool:
    return isinstance(kind, type) and "clip_sample" in inspect.signature(kind).parameters


def check_sampling(
    config: SampleConfig,
    present: SchedulerMixin,
    choose: Callable[[SampleConfig, SchedulerMixin], SchedulerMixin] = usual_scheduler,
) -> SchedulerMixin:
    """See that images can be sampled so, before hours of training for them: the loop is run on a made-up prediction.

    Args:
        config: how to sample.
        present: the scheduler of the forward process, or of the pipeline.
        choose: `usual_scheduler` or `own_scheduler`.

    Returns:
        The scheduler to sample with.

    Raises:
        UserError: they cannot; the message begins with the key.
    """
    interval = config.guidance_interval
    if interval is not None and interval[0] > interval[1]:
        raise UserError(
            f"key `sample.guidance_interval` is {interval}, the first timestep after the last; "
            f"write {interval[::-1]}"
        )
    with _trying(config, present, choose) as (chosen, scheduler):
        scheduler.set_timesteps(config.num_inference_steps)
        sample = torch.zeros(1, 1, 1, 1)
        prediction = sample.repeat(1, 2 if uses_predicted_variance(scheduler) else 1, 1, 1)
        for timestep in scheduler.timesteps:
            sample = scheduler.step(prediction, timestep, sample).prev_sample
    return chosen


def check_sampling_by_prompt(config: SampleConfig, present: SchedulerMixin) -> SchedulerMixin:
    """As `check_sampling` by `own_scheduler`, for a pipeline by prompt: the loop is its call's own, so that here the
    timesteps alone are asked for, as it asks for them.

    Raises:
        UserError: they cannot; the message begins with the key.
    """
    given = {key: config.pipeline_arguments.get(key) for key in ("timesteps", "sigmas")}
    arguments = {key: value for key, value in given.items() if value is not None}
    with _trying(config, present, own_scheduler) as (chosen, scheduler):
        if scheduler.config.get("use_dynamic_shifting"):
            arguments["mu"] = 1.0  # which the call finds from the number of tokens
        scheduler.set_timesteps(None if arguments.keys() & given else config.num_inference_steps, **arguments)
    return chosen


@contextmanager
def _trying(
    config: SampleConfig,
    present: SchedulerMixin,
    choose: Callable[[SampleConfig, SchedulerMixin], SchedulerMixin],
) -> Iterator[tuple[SchedulerMixin, SchedulerMixin]]:
    """The scheduler that is chosen, and a copy to try, so that it keeps no state of the trial; errors name the key."""
    try:
        chosen = choose(config, present)
    except ValueError as error:
        raise UserError(f"key `sample.scheduler`: {error}") from error
    try:
        yield chosen, type(chosen).from_config(chosen.config)
    except Exception as error:  # schedulers check little, and fail where an argument is used
        raise UserError(
            f"key `sample.num_inference_steps` is {config.num_inference_steps}: `{type(chosen).__name__}` cannot "
            f"sample so ({one_line(error)}); set another number, `sample.scheduler` or `sample.scheduler_arguments`"
        ) from error


def uses_predicted_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler uses a variance that the model predicts; others may carry the setting and ignore it."""
    kinds = ("learned", "learned_range")
    return isinstance(scheduler, DDPMScheduler) and scheduler.config.get("variance_type") in kinds


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of a default's type: schedulers take `"no"` for true, as any string."""
    if default is None or default is inspect.Parameter.empty:
        return True
    kinds = (int, float) if isinstance(default, float) else type(default)
    return isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
