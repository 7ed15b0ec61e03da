"""`compress`: a smaller pipeline from a trained one, without training, and what each part of it lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from shd_diffusion.attention import attention_blocks
from shd_diffusion.compression.attention import HeadOptions, Method
from shd_diffusion.compression.budget import Budget, ShapePlan, plan_shape
from shd_diffusion.compression.compress import CompressedPart, Counts, block_plans, compress
from shd_diffusion.compression.costs import cost_of
from shd_diffusion.compression.describe import readme
from shd_diffusion.compression.walk import CalibrationBatch, first_sample
from shd_diffusion.config import RunConfig
from shd_diffusion.data import LatentSource, Source, build_source
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.files import holds_files, locked, replacing_folder, write_json, write_text
from shd_diffusion.models.denoiser import count_parameters, predict
from shd_diffusion.models.factory import TeacherConfig, cast, stored_dtype
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.teacher import Teacher, load_teacher, scheduler_for
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling import save_pipeline
from shd_diffusion.squeezing.plan import PLANS_FILE, plans_to_json
from shd_diffusion.summary import Summary
from shd_diffusion.training.build import check_data
from shd_diffusion.training.calibration import calibration_batches


@dataclass(frozen=True)
class Calibration:
    """A teacher and the data that say how to compress it.

    Attributes:
        path: where the teacher was found.
        config: whose data calibrate.
        teacher: what was found there.
        model: its denoiser, in its place.
        source: of the data.
        scheduler: of the forward process.
        batches: noised as in training.
        vae: that its pipeline by class decodes latents by; None for pixels, and where the pipeline has its own.
    """

    path: str
    config: RunConfig
    teacher: Teacher
    model: ModelMixin
    source: Source
    scheduler: SchedulerMixin
    batches: list[CalibrationBatch]
    vae: ModelMixin | None


def calibrate(
    path: str, config: RunConfig, images: int = 1024, timestep_weights: Sequence[float] | None = None
) -> Calibration:
    """Open a teacher and the data to compress it by.

    Args:
        path: of the teacher: a run, a pipeline or model folder, or a hub name.
        config: of the teacher's run, or of one that trains on the same kind of data.
        images: to calibrate on.
        timestep_weights: see `calibration_batches`.

    Raises:
        UserError: there is no such model, the data are missing, or they are not for it.
    """
    teacher = load_teacher(TeacherConfig(path=path))
    model, source = teacher.model.to(processes().device), build_source(config.trained_on)
    try:
        found = check_data(model, teacher.pipeline, source)
        scheduler = scheduler_for(config.diffusion, teacher.scheduler, found.predicts_variance)
        process = ForwardProcess.from_scheduler(scheduler)
    except ValueError as error:
        raise UserError(f"{path}: cannot be compressed by this config's data ({error})") from error
    if teacher.pipeline is not None:
        teacher.pipeline.local()  # what the result is saved with is had first: nothing that follows can miss it
    vae = None
    if isinstance(source, LatentSource) and source.prompts_sha256 is None:
        vae = source.load_vae()  # a pipeline by prompts has its own
    size = min(64, config.train.micro_batch_size or 64)
    batches = calibration_batches(config, model, source, process, images, size, timestep_weights)
    return Calibration(path, config, teacher, model, source, scheduler, batches, vae)


def plan_run(calibration: Calibration, budget: Budget) -> ShapePlan:
    """The shape for a budget.

    Raises:
        UserError: the model cannot be made so small.
    """
    asked, batches = f"--budget {budget.unit}={budget.share:g}", calibration.batches
    try:
        return plan_shape(calibration.model, batches, predict, budget, first_sample(batches), report=announce)
    except ValueError as error:
        raise UserError(f"{asked}: {calibration.path} cannot be compressed so: {error}") from error


def check_output(output: Path) -> None:
    """Raise UserError if the folder to write holds something."""
    if holds_files(output):
        raise UserError(f"--output {output}: holds files already; give another")


def compress_run(
    calibration: Calibration,
    output: Path,
    heads: Counts = None,
    neurons: Counts = None,
    blocks: int | None = None,
    plain: bool = False,
    budget: Budget | None = None,
    method: Method = "merge",
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
        method: see `HeadOptions`.

    Returns:
        The content of `compression.json`.

    Raises:
        UserError: the folder holds something, or the model cannot be made so small.
    """
    check_output(output)
    path, teacher, model = calibration.path, calibration.teacher, calibration.model
    shape: dict[str, Any] = {"heads": heads, "neurons": neurons, "blocks": blocks}
    plan = None if budget is None else plan_run(calibration, budget)
    if plan is not None:
        shape = plan.arguments
    before = count_parameters(model)
    try:
        options = HeadOptions(method=method)
        found = compress(
            model, calibration.batches, predict, **shape, options=options, plain=plain, report=_tell
        )
    except ValueError as error:
        raise UserError(f"{path}: cannot be compressed so: {error}") from error
    results = {
        "teacher": path,
        "images": sum(len(noised) for noised, *_ in calibration.batches),
        "method": method,
        "parameters": {"before": before, "after": count_parameters(found.model)},
        "lost": found.lost,
        "parts": [asdict(part) for part in found.parts],
    }
    if plan is not None:
        one = first_sample(calibration.batches)
        own = cost_of(found.model, plan.budget.unit, partial(predict, found.model, *one))
        results["plan"] = {**asdict(plan), "lost": plan.lost, "measured_after": own}
    if teacher.pipeline is not None:
        dtype = stored_dtype(teacher.pipeline.local() / teacher.pipeline.part)
        cast(found.model, dtype)  # what is as small as its teacher's: both compute in float32
        results["dtype"] = str(dtype).removeprefix("torch.")
    with locked(output), replacing_folder(output) as temporary:
        check_output(output)  # again, as another command may have been here meanwhile
        source, scheduler = calibration.source, calibration.scheduler
        save_pipeline(
            found.model,
            teacher.pipeline,
            scheduler,
            calibration.vae,
            source.shape,
            temporary,
            source.class_names,
        )
        write_json(temporary / "compression.json", results)
        if method == "merge":
            plans = block_plans(found.groups, found.origins)
            write_text(temporary / PLANS_FILE, plans_to_json(plans))
        write_text(temporary / "README.md", readme(results, teacher.pipeline, found.model))
        _describe_run(RunFolder(temporary), output.name, calibration, found.model)
    return results


def _describe_run(folder: RunFolder, name: str, calibration: Calibration, model: ModelMixin) -> None:
    """Make a pipeline's folder a run of no steps, to be sampled, evaluated and reported like any other."""
    folder.write_config(calibration.config)
    write_json(folder.environment_file, describe_environment())
    blocks, before = (attention_blocks(each).values() for each in (model, calibration.model))
    summary = Summary(
        name=name,
        stage="compress",
        class_name=type(model).__name__,
        parameters=count_parameters(model),
        heads=max((block.heads for block in blocks), default=0),
        head_dim=max((block.head_dim for block in blocks), default=0),
        blocks=len(blocks),
        steps=0,
        images=0,
        class_names=calibration.source.class_names,
        teacher=calibration.path,
        teacher_heads=max((block.heads for block in before), default=0),
    )
    folder.write_summary(summary)


def _tell(part: CompressedPart) -> None:
    announce(f"{part.name}: {part.before} → {part.after} {part.what}, lost {part.lost:.5f}")
