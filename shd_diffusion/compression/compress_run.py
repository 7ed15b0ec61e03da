"""`compress`: a smaller pipeline from a trained one, without training, and what each part of it lost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from rich.table import Table

from shd_diffusion.compression.budget import Budget, ShapePlan, plan_shape
from shd_diffusion.compression.compress import CompressedModel, Counts, Part, compress
from shd_diffusion.compression.costs import UNITS, cost_of
from shd_diffusion.compression.walk import Batch
from shd_diffusion.config import RunConfig
from shd_diffusion.data import LatentSource, Source, build_source
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.files import holds_files, replacing_folder, write_json, write_text
from shd_diffusion.models.denoiser import count_parameters, null_condition, predict
from shd_diffusion.models.factory import TeacherConfig
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.pipeline_folder import PipelineFolder
from shd_diffusion.models.teacher import Teacher, load_teacher, scheduler_for
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce
from shd_diffusion.sampling import save_pipeline
from shd_diffusion.training.batches import (
    BatchLayout,
    StepSampler,
    draw_noise,
    make_batch,
    noise_settings,
)
from shd_diffusion.training.build import conditions_of

README = """# A compressed model

Made by `shd-diffusion compress {teacher}` without training: {shape}. `compression.json` says what each part lost.

{load}
"""
OWN = """The class of its denoiser is `{name}`, for heads or neurons that its stock class cannot have. Install
shd-diffusion, and load it by `{pipeline}.from_pretrained` after `import shd_diffusion.models`, or train it by
`student: {{pretrained: …}}`."""
STOCK = "Its denoiser is a plain diffusers `{name}`."


@dataclass(frozen=True)
class Calibration:
    """A teacher and the data that say how to compress it.

    Attributes:
        path: where the teacher was found.
        teacher: what was found there.
        model: its denoiser, in its place.
        source: of the data.
        scheduler: of the forward process.
        batches: noised as in training.
    """

    path: str
    teacher: Teacher
    model: ModelMixin
    source: Source
    scheduler: SchedulerMixin
    batches: list[Batch]

    @property
    def one(self) -> Batch:
        """A batch of one sample."""
        noised, timesteps, condition = self.batches[0]
        return noised[:1], timesteps[:1], {name: value[:1] for name, value in condition.items()}


def calibrate(
    path: str, config: RunConfig, images: int = 1024, timesteps: tuple[float, float] | None = None
) -> Calibration:
    """Open a teacher and the data to compress it by.

    Args:
        path: of the teacher: a run, a pipeline or model folder, or a hub name.
        config: of the teacher's run, or of one that trains on the same kind of data.
        images: to calibrate on.
        timesteps: see `calibration_batches`.

    Raises:
        UserError: there is no such model, or the data are missing.
    """
    teacher = load_teacher(TeacherConfig(path=path))
    model, source = teacher.model.to(processes().device), build_source(config.trained_on)
    source.condition_names = conditions_of(model, source)
    scheduler = scheduler_for(config.diffusion, teacher.scheduler, False)
    process = ForwardProcess.from_scheduler(scheduler)
    batches = calibration_batches(config, model, source, process, images, timesteps=timesteps)
    return Calibration(path, teacher, model, source, scheduler, batches)


def plan_run(calibration: Calibration, budget: Budget) -> ShapePlan:
    """The shape for a budget.

    Raises:
        UserError: the model cannot be made so small.
    """
    asked = f"--budget {budget.unit}={budget.share:g}"
    try:
        return plan_shape(
            calibration.model, calibration.batches, predict, budget, calibration.one, report=announce
        )
    except ValueError as error:
        raise UserError(f"{asked}: {calibration.path} cannot be compressed so: {error}") from error


def compress_run(
    calibration: Calibration,
    output: Path,
    heads: Counts = None,
    neurons: Counts = None,
    blocks: int | None = None,
    plain: bool = False,
    budget: Budget | None = None,
) -> dict[str, Any]:
    """Compress a trained model, calibrated on data that are noised as in training, and save it in its kind of pipeline.

    Args:
        calibration: see `calibrate`.
        output: the pipeline's folder.
        heads: see `compress`.
        neurons: see `compress`.
        blocks: see `compress`.
        plain: see `compress`.
        budget: instead of heads, neurons and blocks.

    Returns:
        The content of `compression.json`.

    Raises:
        UserError: the folder holds something, or the model cannot be made so small.
    """
    if holds_files(output):
        raise UserError(f"--output {output}: holds files already; give another")
    path, teacher, model = calibration.path, calibration.teacher, calibration.model
    stay: int | Collection[str] | None = blocks
    plan = None if budget is None else plan_run(calibration, budget)
    if plan is not None:
        heads, neurons, stay = plan.counts("heads"), plan.counts("neurons"), plan.blocks
    before = count_parameters(model)
    try:
        found = compress(model, calibration.batches, predict, heads, neurons, stay, plain=plain, report=_tell)
    except ValueError as error:
        raise UserError(f"{path}: cannot be compressed so: {error}") from error
    source, vae = calibration.source, None
    if isinstance(source, LatentSource) and source.prompts_sha256 is None:
        vae = source.load_vae()  # a pipeline by prompts has its own
    results = {
        "teacher": path,
        "images": sum(len(noised) for noised, *_ in calibration.batches),
        "parameters": {"before": before, "after": count_parameters(found.model)},
        "lost": found.lost,
        "parts": [asdict(part) for part in found.parts],
        "environment": describe_environment(),
    }
    if plan is not None:
        own = cost_of(found.model, plan.budget.unit, partial(predict, found.model, *calibration.one))
        results["plan"] = {**asdict(plan), "lost": plan.lost, "measured_after": own}
    with replacing_folder(output) as temporary:
        save_pipeline(found.model, teacher.pipeline, calibration.scheduler, vae, source.shape, temporary)
        write_json(temporary / "compression.json", results)
        write_text(temporary / "README.md", _readme(path, teacher.pipeline, found))
    return results


def calibration_batches(
    config: RunConfig,
    model: ModelMixin,
    source: Source,
    process: ForwardProcess,
    images: int,
    size: int = 64,
    timesteps: tuple[float, float] | None = None,
) -> list[Batch]:
    """Training data as a run sees them, noised and with conditions dropped, but of steps that it never takes.

    Args:
        config: of the run.
        model: that is told the conditions.
        source: of the data.
        process: that noises them.
        images: how many, in whole batches.
        size: of a batch.
        timesteps: first <= t < last, of 0..T: the schedule's shares as training draws them, brought between these two.

    Raises:
        UserError: there are no such timesteps.
    """
    ends = _shares_between(process, timesteps) if timesteps else (0.0, 1.0)
    train, null = config.train, {**null_condition(model), **source.null}
    settings = noise_settings(train, source)
    sampler = StepSampler(config.seed, source.groups, BatchLayout(size), 0, max(1, images // size))
    found = []
    for step, items in enumerate(source.batches(sampler)):
        of_these = replace(settings, shape=source.shape_of(items))
        noise = draw_noise(config.seed, -1 - step, range(size), of_these)
        noise = replace(noise, shares=ends[0] + (ends[1] - ends[0]) * noise.shares)
        batch = make_batch(source, process, items, noise, null, model.device)
        found.append((batch.noised, batch.timesteps, dict(batch.condition)))
    return found


def _shares_between(process: ForwardProcess, timesteps: tuple[float, float]) -> tuple[float, float]:
    first, last = timesteps
    if not 0 <= first < last <= process.num_timesteps:
        raise UserError(
            f"--timesteps {first:g},{last:g}: give a first and a later last of 0 to {process.num_timesteps}"
        )
    low, high = process.shares(torch.tensor([first, last], dtype=torch.float64)).tolist()
    return low, high


def plan_table(plan: ShapePlan) -> Table:
    """What a budget leaves, loses and saves, a line a part, for a terminal."""
    unit, whole = UNITS[plan.budget.unit], plan.before
    rendered = Table(
        title=f"{plan.before:,.6g} → {plan.after:,.6g} {unit}: {plan.after / whole:.1%}",
        title_justify="left",
        show_footer=True,
    )
    rendered.add_column("part", "total")
    for column, total in (
        ("keeps", ""),
        ("lost", f"{plan.lost:.5f}"),
        ("saved", f"{(whole - plan.after) / whole:.1%}"),
    ):
        rendered.add_column(column, total, justify="right")
    for part in plan.parts:
        keeps = "—" if part.what == "block" else f"{part.keeps} of {part.before} {part.what}"
        rendered.add_row(part.name, keeps, f"{part.lost:.5f}", f"{part.saved / whole:.1%}")
    return rendered


def table(results: dict[str, Any]) -> Table:
    """What each part lost, a line each, for a terminal."""
    sizes = results["parameters"]
    rendered = Table(
        title=f"{sizes['before']:,} → {sizes['after']:,} parameters; the prediction lost {results['lost']:.5f}",
        title_justify="left",
    )
    for column in ("part", "what", "before", "after", "lost before the refit", "lost"):
        rendered.add_column(column, justify="left" if column in ("part", "what") else "right")
    for part in results["parts"]:
        numbers = f"{part['lost_before']:.5f}", f"{part['lost']:.5f}"
        rendered.add_row(part["name"], part["what"], str(part["before"]), str(part["after"]), *numbers)
    return rendered


def _tell(part: Part) -> None:
    announce(f"{part.name}: {part.before} → {part.after} {part.what}, lost {part.lost:.5f}")


def _readme(path: str, pipeline: PipelineFolder | None, found: CompressedModel) -> str:
    name = type(found.model).__name__
    by_prompt = pipeline is not None and pipeline.takes_prompts
    kind = "diffusers.DiffusionPipeline" if by_prompt else "shd_diffusion.sampling.ClassConditionalPipeline"
    load = (OWN if name.startswith("Squeezed") else STOCK).format(name=name, pipeline=kind)
    shape = f"{count_parameters(found.model):,} parameters"
    return README.format(teacher=path, shape=shape, load=load)
