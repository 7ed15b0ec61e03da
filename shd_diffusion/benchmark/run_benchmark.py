"""`benchmark`: what models cost, side by side; the first is what the others are told against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shd_diffusion.benchmark.candidates import PROMPT, Candidate, find_run, open_candidate
from shd_diffusion.benchmark.measure import (
    Size,
    Timing,
    count_candidate,
    make_run,
    runs_of,
    size_of,
    time_candidates,
)
from shd_diffusion.config import EvaluationConfig, SampleConfig, check_read, override_config
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import read_json, write_json
from shd_diffusion.processes import processes
from shd_diffusion.progress import progress_bar
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling.execution import as_written, matmul_precision, set_execution
from shd_diffusion.sampling.sample_run import with_prompt_arguments

OF_IMAGES = {"num_images", "labels", "prompts", "images_per_prompt", "batch_size", "pass_size", "seed"}
"""Keys of sampling on which no cost depends."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure.

    Attributes:
        batch_sizes: rising.
        rounds: turns that every candidate takes.
        device: None for that of this process.
        image_size: height and width of text-to-image, in pixels; None for the first run's or the pipeline's default.
        images: measure the sampling of images too, not the denoiser alone.
    """

    batch_sizes: tuple[int, ...] = (1, 16)
    rounds: int = 10
    device: str | None = None
    image_size: int | None = None
    images: bool = True


def check_written(output: Path) -> None:
    """Raise UserError if a file that would be replaced was not written by an earlier call."""
    try:
        found = read_json(output)
    except UserError:
        found = None
    if not (isinstance(found, dict) and {"benchmark", "models"} <= found.keys()):
        raise UserError(
            f"--output {output}: would be replaced, but is no benchmark of shd-diffusion; give another"
        )


def benchmark(names: Sequence[str], plan: Plan, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Count and time models, and leave with each run among them what it costs.

    All are sampled alike: as the first run's config says, or by the defaults.

    Args:
        names: runs, pipeline or model folders, or hub names.
        overrides: of `sample`, as `sample.num_inference_steps=50`.

    Returns:
        `benchmark`: how it was measured; `models`: by name; `environment`.

    Raises:
        UserError: a model cannot be had or executed so; nothing has been timed or written then.
    """
    device = _device(plan.device)
    shown = _short_names(names)
    runs = [run for name in names if (run := find_run(name)) is not None]
    config, size = _sampling(runs, plan, overrides)
    candidates = {
        short: open_candidate(name, config, device, size) for short, name in zip(shown, names, strict=True)
    }
    keys = runs_of(list(candidates.values()), plan.batch_sizes, plan.images)
    total = len(candidates) * len(keys) * (1 + plan.rounds)
    with matmul_precision(config):
        for candidate in candidates.values():
            _try(candidate, config, plan.batch_sizes[-1], device)
        with progress_bar(total, "benchmark", "turn") as bar:
            counted = {}
            for name, each in candidates.items():
                with as_written(each.denoiser, config):
                    counted[name] = count_candidate(each, keys, bar.update)
            timed = time_candidates(candidates, keys, counted, plan.rounds, device, bar.update)
    models = _results(candidates, {n: size_of(candidates[n].denoiser, c) for n, c in counted.items()}, timed)
    settings = {
        "first": shown[0],
        "device": str(device),
        "memory": "allocated" if device.type == "cuda" else "counted",
        "threads": torch.get_num_threads(),
        "rounds": plan.rounds,
        "image_size": None if size is None else list(size),
        "prompt": PROMPT if any(_is_by_prompt(each) for each in candidates.values()) else None,
        "sampling": config.model_dump(exclude=OF_IMAGES),
    }
    environment = describe_environment()
    for name, candidate in candidates.items():
        if candidate.run is not None:
            found = {"benchmark": settings, "name": name, **models[name], "environment": environment}
            write_json(candidate.run.benchmark_file, found)
    return {"benchmark": settings, "models": models, "environment": environment}


def _results(
    candidates: Mapping[str, Candidate], sizes: Mapping[str, Size], timed: Mapping[str, Sequence[Timing]]
) -> dict[str, dict[str, Any]]:
    """What each candidate costs, as plain values; ratios are to the first."""
    first = asdict(next(iter(sizes.values())))
    found = {}
    for name, candidate in candidates.items():
        size = asdict(sizes[name])
        found[name] = {
            "path": candidate.path,
            "class": type(candidate.denoiser).__name__,
            **size,
            "ratios": {key: value / first[key] for key, value in size.items() if value and first[key]},
            "timings": [asdict(timing) for timing in timed[name]],
        }
    return found


def _sampling(
    runs: Sequence[RunFolder], plan: Plan, overrides: Sequence[str]
) -> tuple[SampleConfig, tuple[int, int] | None]:
    """How all are sampled, and the size of images by prompt."""
    config = runs[0].read_config() if runs else None
    sample = config.sample if config is not None else SampleConfig()
    sample = override_config(EvaluationConfig(sample=sample), overrides, "--set").sample
    check_read(overrides, ("sample",), "a benchmark only samples")
    if config is not None and config.prepare is not None:
        sample = with_prompt_arguments(sample, config.prepare)
    pixels = plan.image_size
    if pixels is None and config is not None and config.within is not None:
        pixels = config.data.image_size
    return sample.model_copy(update={"prompts": None}), None if pixels is None else (pixels, pixels)


def _is_by_prompt(candidate: Candidate) -> bool:
    return candidate.sampler is not None and bool(candidate.sampler.told(1).get("prompts"))


def _try(candidate: Candidate, config: SampleConfig, batch_size: int, device: torch.device) -> None:
    """Have a denoiser executed as the config says, and see that it can be.

    Raises:
        UserError: it cannot.
    """
    try:
        set_execution(candidate.denoiser, config)
        make_run(candidate, "call", batch_size)()
    except UserError as error:
        raise UserError(f"{candidate.path}: {error}") from error
    except Exception as error:  # kernels, compilers and allocators fail in their own ways
        how = [
            config.dtype,
            *([config.attention] if config.attention else []),
            *(["compiled"] * config.compile),
        ]
        raise UserError(
            f"{candidate.path}: {batch_size} samples cannot be denoised on {device} in {', '.join(how)} "
            f"({one_line(error)}); choose another --device, --dtype, --attention or --batch-size"
        ) from error


def _device(name: str | None) -> torch.device:
    """The device of that name, or of this process.

    Raises:
        UserError: there is none here.
    """
    if name is None:
        return torch.device(processes().device)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:  # of any kind, by device
        raise UserError(f"--device {name}: cannot be used here ({one_line(error)})") from error
    if device.type == "meta":
        raise UserError(f"--device {name}: computes nothing; give cpu or an accelerator")
    return device


def _short_names(names: Sequence[str]) -> list[str]:
    """The last parts of paths, where they tell them apart.

    Raises:
        UserError: a model is given twice.
    """
    for place, name in enumerate(names):
        if name in names[:place]:
            raise UserError(f"{name}: is given twice; give each model once")
    short = [Path(name).name or name for name in names]
    return short if len(set(short)) == len(short) else list(names)
