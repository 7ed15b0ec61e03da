"""The two stages that train: everything is built and checked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch._dynamo.exc import BackendCompilerFailed

from shd_diffusion.attention import attention_blocks
from shd_diffusion.config import (
    DistillConfig,
    ModelConfig,
    RunConfig,
    SHDConfig,
    TeacherConfig,
    TrainTeacherConfig,
)
from shd_diffusion.data import LatentSource, Source, build_source, check_source
from shd_diffusion.data.vae import load_vae
from shd_diffusion.errors import UserError
from shd_diffusion.files import replacing_folder, write_json, write_text
from shd_diffusion.losses import SHDLoss, map_blocks
from shd_diffusion.losses.baselines import build_baselines
from shd_diffusion.losses.baselines.captured import running_blocks
from shd_diffusion.losses.denoising import ForwardProcess, forward_process
from shd_diffusion.models.adapter import count_parameters, freeze, null_label, sample_shape
from shd_diffusion.models.factory import build_model, load_model
from shd_diffusion.models.init import init_from_teacher
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling import ClassConditionalPipeline, make_scheduler
from shd_diffusion.squeezing.plan import (
    check_merge,
    check_plan,
    parse_plan,
    plan_merges,
    plans_from_json,
    plans_to_json,
)
from shd_diffusion.training.balance import Balanced, check_balance
from shd_diffusion.training.launch import make_accelerator, start_trackers
from shd_diffusion.training.loop import Watch, fit
from shd_diffusion.training.masking import WithMasking, prepare_masking
from shd_diffusion.training.methods import Captures, Denoising, DenoisingLoss, Distillation, Method
from shd_diffusion.training.probe import paired_records, probe_batches, study_attention
from shd_diffusion.training.sharding import shard
from shd_diffusion.training.watch import make_watch


def train_teacher(config: TrainTeacherConfig, output: Path, source: str) -> None:
    """Train a model on the denoising loss alone and save it as a pipeline.

    Args:
        config: what to train, on what.
        output: the run folder; a run of the same config in it is continued.
        source: where the config stands, for messages.

    Raises:
        UserError: the config cannot be carried out, or the folder belongs to another run.
    """
    stage = _open(config, config.model, "model", output, source)
    if stage is None:
        return
    trained = _fit(stage, Denoising(DenoisingLoss(stage.process, config.diffusion)))
    _finish(stage, trained, None)


def distill(config: DistillConfig, output: Path, source: str) -> None:
    """Train a student from a teacher and save it as a pipeline; arguments as for `train_teacher`.

    Raises:
        UserError: the config cannot be carried out (a teacher that is missing or cannot be captured, heads that
            cannot be squeezed), or the folder belongs to another run.
    """
    try:
        teacher = freeze(load_model(config.teacher.path))
    except UserError as error:
        raise UserError(f"{source}: key `teacher.path`: {error}") from error
    stage = _open(config, config.student, "student", output, source, teacher)
    if stage is None:
        return
    place_teacher(teacher, config.teacher, stage.accelerator.device)
    if config.train.shard and config.teacher.device == "accelerator":
        shard(teacher)
    shd = config.losses.shd
    loss = SHDLoss.from_config(shd, config.seed)
    if shd.weight and shd.pairing == "matched":
        _load_or_calibrate(loss, teacher, stage)
    with distillation(config, teacher, stage.model, stage.process, loss) as method:
        trained = _fit(stage, method)
    if _is_comparable(teacher, trained, loss, config, source):
        path = stage.run.attention_file
        try:
            study_attention(loss, teacher, trained, stage.data, stage.process, config.seed, path)
        except ValueError as error:  # such as other token grids, which a run without SHD may have
            announce(f"{stage.run.path}: the attention of teacher and student cannot be shown: {error}")
    _finish(stage, trained, teacher, sum(p.numel() for p in method.parameters()))


def place_teacher(teacher: ModelMixin, config: TeacherConfig, device: torch.device) -> None:
    """Bring a teacher, in place, to the device and the precision that it computes in."""
    teacher.to("cpu" if config.device == "cpu" else device)
    if config.dtype != "float32":
        teacher.to(getattr(torch, config.dtype))


@contextmanager
def distillation(
    config: DistillConfig, teacher: ModelMixin, student: ModelMixin, process: ForwardProcess, shd: SHDLoss
) -> Iterator[Distillation]:
    """The method of a config, whose captures of both models are open as long as the context lasts."""
    losses = config.losses
    baselines = build_baselines(losses, teacher, student, config.seed)
    for baseline in baselines.values():
        baseline.to(student.device)
    denoising, used = DenoisingLoss(process, config.diffusion), shd if losses.shd.weight else None
    with Captures(teacher, student, used is not None, baselines) as captures:
        yield Distillation(denoising, teacher, captures, used, baselines, losses, config.train.max_steps)


def check_pair(teacher: ModelMixin, student: ModelMixin, config: DistillConfig, source: str) -> None:
    """See that this student can be distilled from this teacher.

    Raises:
        UserError: their inputs or classes differ, or with SHD, their attention cannot be captured or squeezed.
    """
    path = config.teacher.path
    try:
        ours, theirs = sample_shape(student), sample_shape(teacher)
        classes, taught = null_label(student), null_label(teacher)
    except ValueError as error:
        raise UserError(f"{source}: key `teacher.path` ({path}): {error}") from error
    if ours != theirs:
        raise UserError(
            f"{source}: key `student.arguments` makes a model of {ours} inputs (channels, height, width), "
            f"but the teacher {path} takes {theirs}; make them equal"
        )
    if classes != taught:
        raise UserError(
            f"{source}: key `student.arguments` gives {classes} classes, but the teacher {path} has {taught}; "
            "make them equal"
        )
    if config.losses.shd.weight:
        check_squeezing(teacher, student, config.losses.shd, path, source)
    try:
        build_baselines(config.losses, teacher, student, config.seed)
    except ValueError as error:
        raise UserError(f"{source}: key {error} (teacher {path})") from error


def check_squeezing(teacher: ModelMixin, student: ModelMixin, shd: SHDConfig, path: str, source: str) -> None:
    """See that the student's attention blocks have teacher blocks whose heads can be squeezed to theirs.

    Raises:
        UserError: they have not.
    """
    found = []
    for key, model in (("teacher.path", teacher), ("student", student)):
        try:
            found.append(running_blocks(model))
        except ValueError as error:
            raise UserError(
                f"{source}: key `{key}`: {error}; choose another model or set losses.shd.weight=0"
            ) from error
    theirs, ours = found
    try:
        taught, learning = ({name: block.kind for name, block in blocks.items()} for blocks in (theirs, ours))
        pairs = map_blocks(taught, learning, shd.layer_map)
    except ValueError as error:
        raise UserError(f"{source}: key `losses.shd.layer_map`: {error}") from error
    for name, taught_by in pairs.items():
        heads = theirs[taught_by].heads, ours[name].heads
        try:
            plan = parse_plan(shd.pairing) if isinstance(shd.pairing, list) else plan_merges(*heads)
            check_plan(plan, *heads)
            check_merge(plan, shd.merge)
        except ValueError as error:
            raise UserError(
                f"{source}: key `student.arguments`: block {name}: {error} (teacher {path})"
            ) from error


def _is_comparable(
    teacher: ModelMixin, student: ModelMixin, loss: SHDLoss, config: DistillConfig, source: str
) -> bool:
    """Whether the report can show the student's attention beside the teacher's, be it trained by SHD or not."""
    if loss.pairing == "matched" and not loss.plans:
        return False
    try:
        check_squeezing(teacher, student, config.losses.shd, config.teacher.path, source)
    except UserError:
        return False
    return True


# --- what both stages share ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """A run that is about to train: everything that its config names, built and checked."""

    config: RunConfig
    run: RunFolder
    model: ModelMixin
    data: Source
    process: ForwardProcess
    sampler: SchedulerMixin
    vae: ModelMixin | None
    watch: Watch | None
    accelerator: Accelerator


def _open(
    config: RunConfig,
    model: ModelConfig,
    key: str,
    output: Path,
    source: str,
    teacher: ModelMixin | None = None,
) -> Stage | None:
    """Build and check everything, then create the run folder; None where the run is complete already."""
    run = RunFolder(output)
    run.check(config)
    if run.summary_file.exists():
        announce(f"{run.path}: complete, nothing to do")
        return None
    process = forward_process(config.diffusion)
    data = build_source(config.data)
    built = build_to_train(config, model, key, source, teacher)
    check_source(data, sample_shape(built), null_label(built), f"{source}: key `{key}.arguments`")
    try:
        sampler = make_scheduler(
            config.sample.scheduler, config.sample.scheduler_arguments, process.scheduler
        )
    except ValueError as error:
        raise UserError(f"{source}: key `sample.scheduler`: {error}") from error
    try:
        accelerator = make_accelerator(config.train, run.path)
        vae = _load_vae(data)
        watch = make_watch(config, sampler, vae, accelerator.device)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    built.to(accelerator.device)  # where captures and baselines look for it
    accelerator.wait_for_everyone()  # everyone has seen the folder as it was
    if accelerator.is_main_process:
        run.create(config)
    start_trackers(accelerator, config)
    accelerator.wait_for_everyone()
    return Stage(config, run, built, data, process, sampler, vae, watch, accelerator)


def _load_vae(data: Source) -> ModelMixin | None:
    """The VAE that latents were encoded by: their pipeline needs it, so it is missed before the training, not after."""
    if not isinstance(data, LatentSource):
        return None
    try:
        with processes().local_main_process_first():
            return load_vae(data.vae)
    except UserError as error:
        raise UserError(f"key `data.path`: the VAE in its manifest.json: {error}") from error


def build_to_train(
    config: RunConfig, model: ModelConfig, key: str, source: str, teacher: ModelMixin | None = None
) -> ModelMixin:
    """The new model of a config, as its training starts.

    Raises:
        UserError: it cannot be built, distilled from this teacher, started from it, or trained as the config says.
    """
    built = _new_model(config, model, f"{source}: key `{key}`")
    key_of_step = "student.init"
    try:
        if isinstance(config, DistillConfig) and teacher is not None:
            check_pair(teacher, built, config, source)
            if config.student.init == "teacher":
                taken = init_from_teacher(built, teacher, config.losses.shd.layer_map)
                if processes().is_main_process:
                    announce(f"{key_of_step}: {taken}")
            key_of_step = "losses.balance"
            check_balance(config, built)
        key_of_step = "train.mask_ratio"
        prepare_masking(built, teacher, config.train.mask_ratio)
        key_of_step = "train.gradient_checkpointing"
        if config.train.gradient_checkpointing:
            built.enable_gradient_checkpointing()
    except ValueError as error:
        raise UserError(f"{source}: key `{key_of_step}`: {error}") from error
    if config.train.compile:
        built.compile()
    return built


def _new_model(config: RunConfig, model: ModelConfig, place: str) -> ModelMixin:
    """The model of a config, with weights that follow from its seed: the same for every variant of one seed."""
    torch.manual_seed(config.seed)
    try:
        built = build_model(model)
        sample_shape(built), null_label(built)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error
    return built


def _load_or_calibrate(loss: SHDLoss, teacher: ModelMixin, stage: Stage) -> None:
    """Give the loss its matched plans, found once for a run and kept with it."""
    path = stage.run.path / "merge_plans.json"
    if path.exists():
        loss.plans = plans_from_json(path.read_text(encoding="utf-8"))
        return
    config = stage.config
    assert isinstance(config, DistillConfig)
    count, size = config.losses.shd.calibration_batches, config.train.batch_size
    batches = probe_batches(stage.data, stage.model, stage.process, count, size, config.seed)
    plans = loss.calibrate(paired_records(teacher, stage.model, batches))
    stage.accelerator.wait_for_everyone()
    if stage.accelerator.is_main_process:
        write_text(path, plans_to_json(plans))


def as_configured(method: Method, config: RunConfig, model: ModelMixin, accelerator: Accelerator) -> Method:
    """The method with masked passes and balanced weights where the config wants them."""
    if config.train.mask_ratio:
        method = WithMasking(method)
    if isinstance(config, DistillConfig) and config.losses.balance:
        method = Balanced(method, model, accelerator)
    return method


def _fit(stage: Stage, method: Method) -> ModelMixin:
    """The trained model with its averaged weights."""
    method = as_configured(method, stage.config, stage.model, stage.accelerator)
    try:
        return fit(
            stage.model,
            method,
            stage.data,
            stage.process,
            stage.run,
            stage.config,
            stage.accelerator,
            stage.watch,
        )
    except BackendCompilerFailed as error:
        raise UserError(
            f"{stage.run.config_file}: torch.compile failed ({str(error).splitlines()[0]}); "
            "leave `train.compile` and `losses.shd.compile` off, or install what it needs"
        ) from error


def _finish(stage: Stage, trained: ModelMixin, teacher: ModelMixin | None, extra_parameters: int = 0) -> None:
    """Save the pipeline, then the summary: a run that has one is complete."""
    if stage.accelerator.is_main_process:
        with replacing_folder(stage.run.pipeline) as temporary:
            pipeline = ClassConditionalPipeline(trained, stage.sampler, stage.vae)
            pipeline.save_pretrained(temporary, safe_serialization=True)
        summary = summarize(stage, trained, teacher)
        write_json(stage.run.summary_file, summary | {"extra_parameters": extra_parameters})
    for tracker in stage.accelerator.trackers:
        tracker.finish()


def summarize(stage: Stage, model: ModelMixin, teacher: ModelMixin | None) -> dict[str, Any]:
    """What the report says of a run; heads are the most that any block has."""
    config, train = stage.config, stage.config.train
    blocks = attention_blocks(model).values()
    return {
        "name": stage.run.path.name,
        "stage": "train-teacher" if teacher is None else "distill",
        "class": type(model).__name__,
        "parameters": count_parameters(model),
        "heads": most_heads(model),
        "head_dim": max((block.head_dim for block in blocks), default=0),
        "blocks": len(blocks),
        "steps": train.max_steps,
        "images": train.max_steps
        * train.batch_size
        * train.gradient_accumulation_steps
        * stage.accelerator.num_processes,
        "teacher": config.teacher.path if isinstance(config, DistillConfig) else None,
        "teacher_heads": None if teacher is None else most_heads(teacher),
    }


def most_heads(model: ModelMixin) -> int:
    """The most heads that any attention block of a model has; 0 if it has none."""
    return max((block.heads for block in attention_blocks(model).values()), default=0)
