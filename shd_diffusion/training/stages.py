"""The two stages that train: everything is built and checked before anything is written."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, ModelMixin

from shd_diffusion.attention import AttentionCapture, attention_blocks
from shd_diffusion.config import DistillConfig, ModelConfig, RunConfig, TrainTeacherConfig
from shd_diffusion.data import build_dataset
from shd_diffusion.errors import UserError
from shd_diffusion.files import replacing_folder, write_json
from shd_diffusion.losses import SHDLoss
from shd_diffusion.losses.denoising import noise_schedule
from shd_diffusion.models.adapter import count_parameters, freeze, null_label, sample_shape
from shd_diffusion.models.factory import build_model, load_model
from shd_diffusion.progress import announce
from shd_diffusion.sampling import ClassConditionalPipeline, make_scheduler
from shd_diffusion.training.loop import fit, make_accelerator
from shd_diffusion.training.methods import Denoising, Distillation, Method
from shd_diffusion.run_folder import RunFolder


def train_teacher(config: TrainTeacherConfig, output: Path, source: str) -> None:
    """Train a model on the denoising loss alone and save it as a pipeline.

    Args:
        config: what to train, on what.
        output: the run folder; a run of the same config in it is continued.
        source: where the config stands, for messages.

    Raises:
        UserError: the config cannot be carried out, or the folder belongs to another run.
    """
    run = RunFolder(output)
    run.check(config)
    model = _new_model(config, config.model, f"{source}: key `model`")
    _train(config, model, Denoising(), run, None)


def distill(config: DistillConfig, output: Path, source: str) -> None:
    """Train a student from a teacher and save it as a pipeline; arguments as for `train_teacher`.

    Raises:
        UserError: the config cannot be carried out (a teacher that is missing or cannot be captured, heads that
            cannot be squeezed), or the folder belongs to another run.
    """
    run = RunFolder(output)
    run.check(config)
    teacher = freeze(load_model(config.teacher.path))
    student = _new_model(config, config.student, f"{source}: key `student`")
    check_pair(teacher, student, config, source)
    with ExitStack() as stack:
        captures = shd = None
        if config.losses.shd.weight:
            captures = (
                stack.enter_context(AttentionCapture(teacher)),
                stack.enter_context(AttentionCapture(student)),
            )
            shd = SHDLoss.from_config(config.losses.shd)
        _train(config, student, Distillation(teacher, captures, shd, config.losses), run, teacher)


def check_pair(teacher: ModelMixin, student: ModelMixin, config: DistillConfig, source: str) -> None:
    """See that this student can be distilled from this teacher.

    Raises:
        UserError: their inputs or classes differ, or with SHD, their attention cannot be captured or squeezed.
    """
    if sample_shape(teacher) != sample_shape(student):
        raise UserError(
            f"{source}: key `student.arguments` makes a model of {sample_shape(student)} inputs (channels, height, "
            f"width), but the teacher {config.teacher.path} takes {sample_shape(teacher)}; make them equal"
        )
    if null_label(teacher) != null_label(student):
        raise UserError(
            f"{source}: key `student.arguments` gives {null_label(student)} classes, but the teacher "
            f"{config.teacher.path} has {null_label(teacher)}; make them equal"
        )


def _new_model(config: RunConfig, model: ModelConfig, place: str) -> ModelMixin:
    """The model of a config on its seed's weights, the same for every variant of one seed."""
    torch.manual_seed(config.seed)
    try:
        built = build_model(model)
        sample_shape(built), null_label(built)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    return built


def _train(config: RunConfig, model: ModelMixin, method: Method, run: RunFolder, teacher: ModelMixin | None) -> None:
    if run.summary_file.exists():
        announce(f"{run.path} is complete; nothing to do")
        return
    accelerator = make_accelerator(config.train)
    if accelerator.is_main_process:
        run.create(config)
    accelerator.wait_for_everyone()
    if teacher is not None:
        teacher.to(accelerator.device)
    schedule = noise_schedule(config.diffusion)
    began = time.perf_counter()
    model = fit(model, method, build_dataset(config.data), schedule, run, config.train, config.seed, accelerator)
    _export(config, model, schedule, run, accelerator)
    if accelerator.is_main_process:
        heads = next(iter(attention_blocks(model).values()))
        write_json(run.summary_file, {})
    accelerator.end_training()


def _export(
    config: RunConfig, model: ModelMixin, schedule: DDPMScheduler, run: RunFolder, accelerator: Accelerator
) -> None:
    scheduler = make_scheduler(config.sample.scheduler, config.sample.scheduler_arguments, schedule)
    if accelerator.is_main_process:
        with replacing_folder(run.pipeline) as temporary:
            ClassConditionalPipeline(model, scheduler).save_pretrained(temporary, safe_serialization=True)
