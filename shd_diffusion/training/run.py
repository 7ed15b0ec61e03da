"""One run from its config to its pipeline: `train-teacher` and `distill`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors.torch import load_file
from torch._dynamo.exc import BackendCompilerFailed

from shd_diffusion.config import DistillConfig, RunConfig, TrainTeacherConfig, ValidationConfig
from shd_diffusion.data import LatentSource, Source, build_source
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.evaluation import check_settings, extractor_name
from shd_diffusion.evaluation.extractors import check_image_size
from shd_diffusion.files import check_outside, json_sha256, locked, replacing_folder, write_text
from shd_diffusion.hashing import hash_model
from shd_diffusion.losses.shd import SHD
from shd_diffusion.model_card import write_card
from shd_diffusion.models.denoiser import count_parameters, num_classes
from shd_diffusion.models.factory import load_model
from shd_diffusion.models.forward_process import settings_of
from shd_diffusion.models.quantised import put_on_grid
from shd_diffusion.processes import by_main_process, processes
from shd_diffusion.progress import announce
from shd_diffusion.run_folder import RunFolder, checkpoint_steps, run_name
from shd_diffusion.sampling import check_sampling, save_pipeline
from shd_diffusion.sampling.by_prompt import call_arguments
from shd_diffusion.sampling.schedulers import check_sampling_by_prompt, usual_scheduler
from shd_diffusion.squeezing.plan import BlockPlan, plans_to_json
from shd_diffusion.summary import Summary
from shd_diffusion.training.batches import BatchLayout, noise_settings
from shd_diffusion.training.build import (
    Parts,
    build,
    is_quantised,
    model_section,
    read_plans,
    squeezed_by,
    teacher_rate,
)
from shd_diffusion.training.checkpoints import CheckpointFolder, checkpoint_path
from shd_diffusion.training.checks import check_scaled_gradients
from shd_diffusion.training.diagnostics import paired_records, probe_batches, save_attention_maps
from shd_diffusion.training.launch import (
    describe_launch,
    describe_losses,
    make_accelerator,
    start_trackers,
)
from shd_diffusion.training.loop import Validation, fit
from shd_diffusion.training.objectives import TEACHER, TrainingLoss
from shd_diffusion.training.squeeze_student import squeeze_student
from shd_diffusion.training.train_state import forget_whole, place, scatter, unsharded
from shd_diffusion.training.validation import make_validation
from shd_diffusion.training.validation_loss import make_validation_loss


@dataclass(frozen=True)
class Run:
    """A run that is about to train.

    Attributes:
        sampler: the scheduler that its pipeline is saved with.
        vae: that latents are decoded by; None for pixels.
        validation: by samples, while it trains; None where none is wanted.
        inputs: hashes of what the run begins with, by the key of the config that names it.
    """

    folder: RunFolder
    parts: Parts
    sampler: SchedulerMixin
    vae: ModelMixin | None
    validation: Validation | None
    accelerator: Accelerator
    inputs: dict[str, str]


def train(
    config: TrainTeacherConfig | DistillConfig, output: Path, source: str, finish: bool = False
) -> None:
    """Train a model, from a teacher where the config names one, and save it as a pipeline.

    Args:
        output: the run folder; a run of the same config in it is continued.
        finish: save what the last checkpoint has as the pipeline, and take no step; the run can go on later.

    Raises:
        UserError: the config cannot be carried out, the folder belongs to another run, or there is nothing to finish.
    """
    folder = RunFolder(output)
    folder.check(config, moved=True)
    check_outside(output, config.reads)
    ended = folder.is_complete(config)
    complete = ended and folder.pipeline.is_dir()
    run = None if complete and not folder.reads_elsewhere(config) else open_run(config, folder, source)
    if run is None or complete:
        run = None  # its models make room
        with locked(folder.path, processes()):
            if processes().is_main_process:
                folder.write_config(config)
                if not (folder.pipeline / "README.md").exists():  # killed before it was written
                    write_card(folder)
            if isinstance(config, DistillConfig) and not folder.attention_file.exists():
                _finish_attention_maps(folder, config, source)
        announce(f"{folder.path}: complete, nothing to do")
        return
    if finish and not checkpoint_steps(folder.checkpoints):
        raise UserError(f"{output}: --finish: has no checkpoint yet, so nothing can be saved; leave it out")
    with locked(folder.path, run.accelerator):
        folder.check(config, moved=True)  # again, as another command may have been here meanwhile
        start = _checkpoints(run).latest(config.train.max_steps)
        if ended and start < config.train.max_steps:
            raise UserError(
                f"{folder.pipeline}: has no pipeline any more, nor has {folder.checkpoints} its last step; give "
                "another --output, or delete the folder"
            )
        _train(run, start, finish)


def _train(run: Run, start: int, finish: bool) -> None:
    """All that writes, from the checkpoint of a step on."""
    folder, parts, accelerator, config = run.folder, run.parts, run.accelerator, run.parts.config
    accelerator.wait_for_everyone()  # everyone has seen the folder as it was
    if accelerator.is_main_process:
        folder.create(config, run.inputs)
        announce(describe_launch(accelerator, config.train))
        announce(describe_losses(parts.terms))
    accelerator.wait_for_everyone()
    start_trackers(accelerator, config, folder)
    teacher = None if parts.teacher is None else parts.teacher.model
    if isinstance(config, DistillConfig) and not start:
        squeezed = config.student.init == "squeeze"
        plans = squeeze_student(parts, accelerator) if squeezed else squeezed_by(config)
        matched = config.losses["shd"].pairing == "matched"  # type: ignore[attr-defined]  # those are found below
        if accelerator.is_main_process and plans and not matched:
            write_text(folder.merge_plans_file, plans_to_json(plans))
        accelerator.wait_for_everyone()
    place_models(parts, accelerator)
    for term in parts.terms.values():
        term.to(accelerator.device)
    loss = TrainingLoss(
        parts.process, parts.terms, parts.model, teacher, config.train.max_steps, teacher_rate(config)
    )
    if loss.shd is not None and teacher is not None:
        if loss.shd.config.pairing == "matched" and not folder.merge_plans_file.exists():
            _calibrate(loss.shd, teacher, run)
        loss.shd.take_plans(_known_plans(folder, config))
    with loss:
        trained, steps = _fit(run, loss, start, finish)
    _save(run, trained, steps)  # first of all: nothing that follows can lose it
    try_attention_maps(folder, parts, trained, loss.shd)
    for tracker in accelerator.trackers:
        tracker.finish()


def place_models(parts: Parts, accelerator: Accelerator) -> None:
    """Bring student and teacher, in place, to where they compute."""
    config = parts.config
    place(parts.model, accelerator.device, config.train.shard)
    if parts.teacher is not None and isinstance(config, DistillConfig):
        on_cpu = config.teacher.device == "cpu"
        device = torch.device("cpu") if on_cpu else accelerator.device
        place(parts.teacher.model, device, config.train.shard and not on_cpu)


def _checkpoints(run: Run) -> CheckpointFolder:
    config = run.parts.config
    return CheckpointFolder(
        run.folder.checkpoints, run.folder.identity(config), run.accelerator, config.train.keep_last
    )


def to_look_at(config: Any) -> Any:
    """The config of a run that is opened, but not to train: by whatever processes look at it, without validation."""
    alone: dict[str, Any] = {
        "num_processes": None,
        "shard": False,
        "mixed_precision": "no",
        "trackers": [],
        "compile": False,
        "micro_batch_size": None,
        "validation": ValidationConfig(),
    }
    assert isinstance(config, RunConfig)
    return config.model_copy(update={"train": config.train.model_copy(update=alone)})


# --- before the first step ----------------------------------------------------------------------------------------


def open_run(config: TrainTeacherConfig | DistillConfig, folder: RunFolder, source: str) -> Run:
    """Build and check everything; nothing is written.

    Raises:
        UserError: something is missing, does not fit, or is not what the run began with.
    """
    try:
        accelerator = make_accelerator(config.train, folder.path)
        data = build_source(config.trained_on)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    parts = build(config, source, data)
    inputs = by_main_process(partial(_hash_inputs, parts))  # files by the million, weights by the gigabyte
    folder.check_inputs(config, inputs)
    try:
        check_scaled_gradients(parts.terms, config.train.shard, config.train.mixed_precision)
        vae, validation = None, None
        kind = None if parts.pipeline is None else parts.pipeline.pipeline_class
        if kind is not None and parts.pipeline is not None and parts.pipeline.takes_prompts:
            call_arguments(kind, config.sample)
            sampler = check_sampling_by_prompt(config.sample, parts.process.scheduler)
            if config.train.validation.every and not config.train.validation.loss_images:
                raise UserError(
                    "key `train.validation.every`: FID while training is for images by class; set "
                    "`train.validation.loss_images`, or this to 0"
                )
        else:
            usual = partial(usual_scheduler, in_pixels=not isinstance(data, LatentSource))
            sampler = check_sampling(config.sample, parts.process.scheduler, usual)
            vae = _load_vae(data)
            validation = make_validation(config, sampler, vae, data, accelerator.device)
        check_settings(config.evaluate, config.data.name)
        check_image_size(extractor_name(config.evaluate.extractor, config.data.name), data.image_size)
    except (UserError, ValueError) as error:
        raise UserError(f"{source}: {error}") from error
    return Run(folder, parts, sampler, vae, validation, accelerator, inputs)


def _hash_inputs(parts: Parts) -> dict[str, str]:
    """Hashes of what a run begins with, by the key of the config that names it."""
    process = json_sha256(settings_of(parts.process.scheduler))
    inputs = {"data": parts.data.fingerprint(), "diffusion": process}
    if parts.teacher is not None:
        inputs["teacher.path"] = hash_model(parts.teacher.model)
    key, trained = model_section(parts.config)
    if trained.pretrained is not None:
        inputs[f"{key}.pretrained"] = hash_model(parts.model)
    return inputs


def _load_vae(data: Source) -> ModelMixin | None:
    """The VAE that latents were encoded by: their pipeline needs it, so it is missed before the training, not after."""
    if not isinstance(data, LatentSource):
        return None
    try:
        with processes().local_main_process_first():
            return data.load_vae()
    except UserError as error:
        raise UserError(f"key `data.path`: the VAE in its manifest.json: {error}") from error


def _known_plans(folder: RunFolder, config: TrainTeacherConfig | DistillConfig) -> dict[str, BlockPlan]:
    """The plans that a run keeps, or else those by which its student was squeezed."""
    file = folder.merge_plans_file
    return read_plans(file) if file.exists() else squeezed_by(config)


def _calibrate(shd: SHD, teacher: ModelMixin, run: Run) -> None:
    """Find the matched plans of a run, once, and keep them with it."""
    parts, accelerator = run.parts, run.accelerator
    train = parts.config.train
    size = min(train.batch_size, train.micro_batch_size or train.batch_size)
    batches = probe_batches(
        parts.data,
        parts.process,
        parts.null,
        accelerator.device,
        shd.config.calibration_batches,
        size,
        parts.config.seed,
    )
    plans = shd.loss.calibrate(
        (of_teacher, of_student)
        for _, of_teacher, of_student in paired_records(shd, teacher, parts.model, batches)
    )
    forget_whole(parts.model)  # what trains are its shards
    # A tie that is broken by rounding must be broken alike in every process.
    shared = broadcast_object_list([plans_to_json(plans)])[0]
    if accelerator.is_main_process:
        write_text(run.folder.merge_plans_file, shared)
    accelerator.wait_for_everyone()


def _fit(run: Run, loss: TrainingLoss, start: int, finish: bool) -> tuple[ModelMixin, int]:
    """The trained model with its averaged weights, and its steps."""
    parts, device = run.parts, run.accelerator.device
    validations = [each for each in (run.validation, _validation_loss(run, loss)) if each is not None]
    try:
        return fit(
            parts.model,
            loss,
            parts.loader(device),
            run.folder,
            parts.config,
            run.accelerator,
            start,
            validations,
            finish,
        )
    except BackendCompilerFailed as error:
        raise UserError(
            f"{run.folder.config_file}: torch.compile failed ({str(error).splitlines()[0]}); "
            "leave `train.compile` and `losses.shd.compile` off, or install what it needs"
        ) from error


def _validation_loss(run: Run, loss: TrainingLoss) -> Validation | None:
    """The validation that needs the loss; None where none is wanted."""
    parts, train = run.parts, run.parts.config.train
    if not train.validation.every or not train.validation.loss_images:
        return None
    layout = BatchLayout(train.batch_size, train.micro_batch_size, run.accelerator.num_processes)
    return make_validation_loss(
        loss,
        parts.data,
        noise_settings(train, parts.data),
        parts.config.seed,
        train.validation.loss_images,
        max(map(len, layout.passes)),
        run.accelerator,
        parts.null,
    )


# --- after the last step ------------------------------------------------------------------------------------------


def _save(run: Run, trained: ModelMixin, steps: int) -> None:
    """Save the pipeline, then the summary: a run that has one for all its steps is complete."""
    whole = unsharded(trained, keep=run.accelerator.is_main_process)
    if run.accelerator.is_main_process and whole is not None:
        write_pipeline(run, run.folder, run_name(run.folder.path), whole, steps)
        write_card(run.folder)


def write_pipeline(run: Run, folder: RunFolder, name: str, model: ModelMixin, steps: int) -> None:
    """Save a model in its pipeline, then the summary, into the run's folder or another."""
    parts = run.parts
    if is_quantised(parts.config):
        put_on_grid(model)
    with replacing_folder(folder.pipeline) as temporary:
        names = parts.data.class_names
        save_pipeline(model, parts.pipeline, run.sampler, run.vae, parts.data.shape, temporary, names)
    folder.write_summary(summarize(name, parts, model, steps))


def summarize(name: str, parts: Parts, model: ModelMixin, steps: int) -> Summary:
    """What the run has come to."""
    config, records = parts.config, parts.student_trace.records.values()
    beside = (parameter for term in parts.terms.values() for parameter in term.parameters())
    return Summary(
        name=name,
        stage="distill" if isinstance(config, DistillConfig) else "train-teacher",
        class_name=type(model).__name__,
        parameters=count_parameters(model),
        heads=parts.student_trace.heads,
        head_dim=max((record.query.shape[3] for record in records), default=0),
        blocks=len(records),
        steps=steps,
        images=steps * config.train.batch_size,
        class_names=parts.data.class_names if num_classes(model) is not None else None,
        teacher=config.teacher.path if isinstance(config, DistillConfig) else None,
        teacher_heads=None if parts.teacher_trace is None else parts.teacher_trace.heads,
        extra_parameters=sum(parameter.numel() for parameter in beside),
        losses={term: built.config.weight for term, built in parts.terms.items()},
    )


def _finish_attention_maps(folder: RunFolder, config: DistillConfig, source: str) -> None:
    """Make the attention maps of a complete run that has none, such as one that ran out of memory over them."""
    run = open_run(to_look_at(config), folder, source)
    parts = replace(run.parts, model=load_model(str(folder.path)).eval())
    checkpoint = checkpoint_path(folder.checkpoints, folder.read_summary().steps)
    if teacher_rate(config) is not None and not checkpoint.is_dir():
        announce(
            f"{folder.path}: the report will show no attention maps (its teacher trained too, but {checkpoint} is gone)"
        )
        return
    take_teacher_of(checkpoint, parts)
    place_models(parts, run.accelerator)
    try_attention_maps(folder, parts, parts.model, None)


def take_teacher_of(checkpoint: Path, parts: Parts) -> None:
    """Put a teacher that trains too back to what it was at a checkpoint; one that does not is as it always was."""
    if parts.teacher is not None and teacher_rate(parts.config) is not None:
        kept, teacher = load_file(checkpoint / "loss.safetensors"), parts.teacher.model.state_dict()
        scatter({name: kept[f"{TEACHER}.{name}"] for name in teacher}, teacher)


def try_attention_maps(folder: RunFolder, parts: Parts, trained: ModelMixin, shd: SHD | None) -> None:
    """Write what the report shows of teacher's and student's attention, be it trained by SHD or not; if it fails,
    say so and go on."""
    if parts.teacher is None or parts.teacher_trace is None:
        return
    config = parts.config
    assert isinstance(config, DistillConfig)
    try:
        if shd is None:
            options = config.losses["shd"]
            shd = SHD(options, parts.student_trace, parts.teacher_trace, config.seed)  # type: ignore[arg-type]
            shd.take_plans(_known_plans(folder, config))
        elements = max(
            record.query.shape[1] * record.query.shape[2] * record.key.shape[2]
            for record in parts.teacher_trace.records.values()
        )
        save_attention_maps(shd, parts, trained, folder.attention_file, elements, folder.pipeline)
    except Exception as error:  # whatever it is, out of memory for one: the run itself is complete
        announce(f"{folder.path}: the report will show no attention maps ({one_line(error)})")
