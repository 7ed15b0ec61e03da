"""What is benchmarked: a denoiser, how it is called, and what samples images with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from shd_diffusion.benchmark.count import Run
from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.models.denoiser import num_classes, predict, sample_shape
from shd_diffusion.models.factory import load_model
from shd_diffusion.models.pipeline_call import call_defaults
from shd_diffusion.models.pipeline_folder import find_pipeline
from shd_diffusion.models.prompts import PromptEncoder, first_step
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling.by_class import ByClass
from shd_diffusion.sampling.by_prompt import ByPrompt
from shd_diffusion.sampling.execution import denoiser_of
from shd_diffusion.sampling.image_sampler import ImageSampler
from shd_diffusion.sampling.open_pipeline import open_pipeline
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline
from shd_diffusion.sampling.sample_run import set_scheduler

PROMPT = "a photograph of a red fox that sleeps in the grass beside an old wooden fence"
LEARNING_SIZE = (512, 512)  # pixels, by which a pipeline's call is asked how it is told not to guide


@dataclass(frozen=True)
class Candidate:
    """A model on the device, ready to be called.

    Attributes:
        path: where it was found.
        run: whose it is, if it is a run's.
        denoiser: the model itself.
        models: it, and what else the pipeline samples by.
        calls: number of samples to a call of the denoiser on so many, without guidance.
        sampler: makes images; None for a model without a pipeline.
    """

    path: str
    run: RunFolder | None
    denoiser: ModelMixin
    models: list[nn.Module]
    calls: Callable[[int], Run]
    sampler: ImageSampler | None

    def images(self, batch_size: int) -> Run:
        """A call that makes so many images."""
        assert self.sampler is not None
        make = self.sampler.images
        return lambda: make(range(batch_size))


def find_run(name: str) -> RunFolder | None:
    """The run of that name; None where it is something else.

    Raises:
        UserError: its training has not ended, or its pipeline was deleted.
    """
    run = RunFolder(Path(name))
    if not run.config_file.exists():
        return None
    run.finished_pipeline()
    return run


def open_candidate(
    name: str, config: SampleConfig, device: torch.device, size: tuple[int, int] | None
) -> Candidate:
    """Open a model by its run, its pipeline's or its own folder, or its hub name.

    Args:
        config: how images are sampled; whatever prompts it names, all are `PROMPT`.
        size: height and width of the images of a text-to-image pipeline; None: the pipeline's default.

    Raises:
        UserError: there is none, or it cannot be sampled so.
    """
    run = find_run(name)
    place = _pipeline_of(name, run)
    if place is None:
        return _bare(name, config, device)
    pipeline = open_pipeline(place, config.dtype)
    try:
        set_scheduler(pipeline, config)
        sampler = _sampler(pipeline, config, size)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        denoiser = denoiser_of(pipeline).eval()
        if isinstance(pipeline, ClassConditionalPipeline):
            calls = calls_by_class(denoiser, pipeline.noise_shape)
        else:
            arguments = call_defaults(type(pipeline)) | config.pipeline_arguments
            calls = _calls_by_prompt(pipeline, denoiser, size, arguments)
    except (UserError, ValueError) as error:  # pipelines refuse sizes and arguments as they like
        raise UserError(f"{name}: {one_line(error)}") from error
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return Candidate(name, run, denoiser, models, calls, sampler)


def _pipeline_of(name: str, run: RunFolder | None) -> str | None:
    """The pipeline around a model, by its folder or hub name."""
    if run is not None:
        return str(run.pipeline)
    around = find_pipeline(name)
    return None if around is None else around.name


def _bare(name: str, config: SampleConfig, device: torch.device) -> Candidate:
    """A model without a pipeline.

    Raises:
        UserError: there is none, or it is not known what it is told.
    """
    model = load_model(name, getattr(torch, config.dtype)).eval().to(device)
    shape = sample_shape(model)
    arguments = inspect.signature(type(model).forward).parameters
    takes_more = num_classes(model) is None and "encoder_hidden_states" in arguments
    if shape is None or takes_more:
        what = "what it is told of a prompt" if takes_more else "the size of its samples"
        raise UserError(f"{name}: a {type(model).__name__} alone does not say {what}; give its pipeline")
    return Candidate(name, None, model, [model], calls_by_class(model, shape), None)


def _sampler(pipeline: DiffusionPipeline, config: SampleConfig, size: tuple[int, int] | None) -> ImageSampler:
    if not isinstance(pipeline, ClassConditionalPipeline):
        return ByPrompt(pipeline, config, [PROMPT], size)
    if size is not None:
        raise UserError("--image-size: is for text-to-image pipelines, and this one makes images by class")
    return ByClass(pipeline, config)


def calls_by_class(model: ModelMixin, shape: tuple[int, ...]) -> Callable[[int], Run]:
    classes, device = num_classes(model), model.device

    def call(samples: int) -> Run:
        noised = torch.randn(samples, *shape, device=device, dtype=model.dtype)
        timesteps = torch.full((samples,), 500, device=device)
        condition = (
            {} if classes is None else {"class_labels": torch.arange(samples, device=device) % classes}
        )
        return lambda: predict(model, noised, timesteps, condition)

    return call


def _calls_by_prompt(
    pipeline: DiffusionPipeline,
    model: ModelMixin,
    size: tuple[int, int] | None,
    arguments: dict[str, Any],
) -> Callable[[int], Run]:
    """Calls as the pipeline itself makes them, recorded."""
    without_guidance = PromptEncoder(pipeline, size or LEARNING_SIZE, arguments).without_guidance
    sizes = {} if size is None else {"height": size[0], "width": size[1]}

    def call(samples: int) -> Run:
        told: dict[str, Any] = {"num_inference_steps": 2, **sizes, **without_guidance, **arguments}
        recorded, *_ = first_step(pipeline, [PROMPT] * samples, **told).calls
        return lambda: model(**(recorded | {"return_dict": False}))

    return call
