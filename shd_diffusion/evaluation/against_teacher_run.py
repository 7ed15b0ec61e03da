"""`evaluate.against_teacher`: the student of a run against the teacher of its config."""

from __future__ import annotations

import copy
import importlib.metadata
from dataclasses import asdict
from typing import Any

from diffusers import DiffusionPipeline

from shd_diffusion.config import DistillConfig, RunConfig, SampleConfig
from shd_diffusion.data.decoding import decode
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.against_teacher import against_teacher, summarise
from shd_diffusion.evaluation.extractors import Extractor
from shd_diffusion.evaluation.lpips import LPIPS, lpips_is_missing
from shd_diffusion.files import json_sha256
from shd_diffusion.hashing import hash_model
from shd_diffusion.models.factory import load_model
from shd_diffusion.models.prompts import denoiser_name
from shd_diffusion.models.teacher import load_teacher
from shd_diffusion.processes import processes
from shd_diffusion.protocol import OF_THE_MODEL
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sample_folder import Summary, image_path
from shd_diffusion.sampling.by_class import ByClass
from shd_diffusion.sampling.by_prompt import ByPrompt
from shd_diffusion.sampling.execution import denoiser_of, set_execution
from shd_diffusion.sampling.image_sampler import ImageSampler
from shd_diffusion.sampling.open_pipeline import open_pipeline
from shd_diffusion.sampling.schedulers import own_scheduler

KEY = "evaluate.against_teacher"


def compare_with_teacher(
    run: RunFolder, config: RunConfig, sampled: Summary, extractor: Extractor
) -> dict[str, Any]:
    """What `metrics.json` says under `against_teacher`: measures with intervals, the values behind them, a protocol.

    The images are those of the run's samples: their prompts or labels, noise, scheduler and guidance; of several images
    of a prompt the first.

    Raises:
        UserError: the run has no teacher, or too few samples, or its teacher cannot be loaded, or is another by now.
    """
    path = config.teacher.path if isinstance(config, DistillConfig) else run.read_summary().teacher
    if path is None:
        raise UserError(f"{run.config_file}: key `{KEY}`: this run has no teacher; set it to 0")
    indices = chosen_images(sampled, config.evaluate.against_teacher)
    if len(indices) < config.evaluate.against_teacher:
        what = "images" if sampled.prompts is None else "different prompts"
        raise UserError(
            f"key `{KEY}` is {config.evaluate.against_teacher}, but {run.samples} has {len(indices)} {what}; "
            "sample more, or lower it"
        )
    if isinstance(config, DistillConfig):
        of_teacher = {"teacher.path": hash_model(load_teacher(config.teacher).model)}
        run.check_inputs(config, of_teacher, some=True)
    sample = _sampling_of(sampled)
    pipeline = open_pipeline(str(run.finished_pipeline()), sample.dtype)
    pipeline.scheduler = own_scheduler(sample, pipeline.scheduler)
    student, teacher = (
        _sampler(each, sample, sampled) for each in (pipeline, with_denoiser_of(pipeline, path))
    )
    height, width = decode(image_path(run.samples, 0), str(image_path(run.samples, 0))).shape[1:]
    left_out = lpips_is_missing(height, width)
    lpips = None if left_out else LPIPS()
    protocol = {key: value for key, value in sampled.protocol.items() if key not in OF_THE_MODEL} | {
        "teacher_sha256": hash_model(denoiser_of(teacher.pipeline)),
        "images_sha256": json_sha256([(index, _made_from(sampled, index)) for index in indices]),
        "features": extractor.reported,
        "extractor_sha256": extractor.sha256,
        "lpips": None if lpips is None else lpips.protocol(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers")},
    }
    for sampler in (student, teacher):
        sampler.pipeline.to(processes().device)
        set_execution(denoiser_of(sampler.pipeline), sample)
    measures = against_teacher(student, teacher, indices, extractor, lpips, sample.pass_size)
    return {
        **{name: asdict(estimate) for name, estimate in summarise(measures).items()},
        "indices": indices,
        "per_image": measures,
        "protocol": protocol,
        "notes": [f"LPIPS is left out: {left_out}"] if left_out else [],
    }


def chosen_images(sampled: Summary, count: int) -> list[int]:
    """The first images of a run's samples, of several of a prompt the first: `count`, or all that there are."""
    if sampled.prompts is None:
        return list(range(min(count, sampled.num_images)))
    first = {prompt: index for index, prompt in reversed(list(enumerate(sampled.prompts)))}
    return sorted(first.values())[:count]


def _sampling_of(sampled: Summary) -> SampleConfig:
    """How the samples were made."""
    known = {key: value for key, value in sampled.protocol.items() if key in SampleConfig.model_fields}
    clip = bool(sampled.protocol.get("clip"))
    # its prompts are told image by image
    return SampleConfig(**{**known, "clip": clip, "images_per_prompt": 1})


def _sampler(pipeline: DiffusionPipeline, sample: SampleConfig, sampled: Summary) -> ImageSampler:
    """What makes image j of the samples from another model too."""
    if sampled.prompts is None:
        return ByClass(pipeline, sample)
    height, width = (sampled.protocol.get(key) for key in ("height", "width"))
    size = None if height is None or width is None else (height, width)
    return ByPrompt(pipeline, sample, sampled.prompts, size)


def _made_from(sampled: Summary, index: int) -> str | int | None:
    """The prompt or the label of an image."""
    told = sampled.labels if sampled.prompts is None else sampled.prompts
    return None if told is None else told[index]


def with_denoiser_of(pipeline: DiffusionPipeline, path: str) -> DiffusionPipeline:
    """The same pipeline with another denoiser in it, in the precision of its own; all else is shared.

    Raises:
        UserError: there is no model at `path`.
    """
    part = denoiser_name(pipeline)
    exchanged = copy.copy(pipeline)
    exchanged.register_modules(**{part: load_model(path, getattr(pipeline, part).dtype).eval()})
    return exchanged
