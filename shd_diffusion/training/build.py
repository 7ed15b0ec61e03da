"""Everything that a config names, built and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.compression.narrow import check_can_be_squeezed_into
from shd_diffusion.config import DistillConfig, RunConfig, TrainTeacherConfig, read_run_config
from shd_diffusion.data import LatentSource, Source
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_as
from shd_diffusion.losses import Term, build_terms
from shd_diffusion.losses.shd import SHD
from shd_diffusion.models.denoiser import null_condition, num_classes, num_tokens
from shd_diffusion.models.factory import ModelConfig, build_model, fill_in, first_of, load_model
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.pipeline_folder import PipelineFolder, find_pipeline
from shd_diffusion.models.quantised import quantise
from shd_diffusion.models.teacher import Teacher, load_teacher, scheduler_for
from shd_diffusion.models.trace import Trace, trace
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce
from shd_diffusion.run_folder import PIPELINE
from shd_diffusion.squeezing.plan import PLANS_FILE, BlockPlan, StoredPlan
from shd_diffusion.training.batches import BatchLayout, BatchLoader, noise_settings
from shd_diffusion.training.checks import (
    check_classes,
    check_co_training,
    check_guidance,
    check_latent_space,
    check_masking,
    check_pair,
    check_passes,
    check_prepared,
    check_projectors,
    check_prompts,
    check_timesteps,
    check_variance,
)
from shd_diffusion.training.init_student import init_from_teacher, paired_blocks


@dataclass(frozen=True)
class Parts:
    """What a run is made of.

    Attributes:
        model: to be trained, on the CPU.
        teacher: None where nobody teaches.
        pipeline: that the model is to stand in; None where the run makes one of its own kind.
        terms: of the loss, by name.
        null: what a dropped condition is replaced by.
        student_trace: what a pass of the model looks like.
        teacher_trace: the same of the teacher.
        origins: where the student is to be squeezed from its teacher, the teacher's block of each of its own.
    """

    config: TrainTeacherConfig | DistillConfig
    model: ModelMixin
    teacher: Teacher | None
    pipeline: PipelineFolder | None
    data: Source
    process: ForwardProcess
    terms: dict[str, Term]
    null: dict[str, Tensor]
    student_trace: Trace
    teacher_trace: Trace | None
    origins: Mapping[str, str] = field(default_factory=dict)

    def loader(self, device: torch.device) -> Callable[[BatchLayout, int], BatchLoader]:
        """From a layout and the first step to a process's batches."""
        train, seed = self.config.train, self.config.seed
        settings = noise_settings(train, self.data, num_tokens(self.model) if train.mask_ratio else 0)

        def make(layout: BatchLayout, start: int) -> BatchLoader:
            steps = start, train.max_steps
            extra = train.mask_ratio, train.mix
            return BatchLoader(
                self.data, self.process, self.null, seed, layout, settings, device, steps, *extra
            )

        return make


def build(
    config: TrainTeacherConfig | DistillConfig,
    source: str,
    data: Source,
    teacher: Teacher | None = None,
    model: ModelMixin | None = None,
) -> Parts:
    """Build what a config names, on the CPU.

    Args:
        teacher: of a distillation; None loads the config's.
        model: that is trained; None builds the config's.

    Raises:
        UserError: something cannot be built, does not fit the rest, or cannot be trained as the config says.
    """
    key, model_config = model_section(config)
    check = partial(_naming, source)
    if isinstance(config, DistillConfig) and teacher is None:
        with check("teacher.path"):
            teacher = load_teacher(config.teacher)
    pipeline = _pipeline_for(config, teacher, data, check)
    with check("data.path"):
        example = data.example()
    with check(key):
        model = new_model(config, model_config) if model is None else model
        data = copy(data)
        data.condition_names = conditions_of(model, data)
        example = {name: example[name] for name in data.condition_names}
        student_trace = _trace(model, data, example)
        check_classes(model, data)
    teacher_trace, origins = None, {}
    if teacher is not None and isinstance(config, DistillConfig):
        with check("teacher.path"):
            check_pair(teacher, model, config.teacher.path)
            teacher_trace = _trace(teacher.model, data, example)
        with check("teacher.learning_rate"):
            if config.teacher.learning_rate is not None:
                check_co_training(config)
                teacher.model.requires_grad_(True)
        with check("student.init"):
            origins = _initialise(config, model, teacher.model, student_trace, teacher_trace)
    with check("train.guidance_range"):
        check_guidance(config.train.guidance_range, example)
    with check(""):
        process = _forward_process(config, teacher, pipeline, student_trace.predicts_variance)
    with check(f"{key}.arguments"):
        check_variance(student_trace.predicts_variance, process)
    terms = _terms(config, student_trace, teacher_trace, process, len(data.groups), check)
    with check("train.mask_ratio"):
        if config.train.mask_ratio:
            _try_masked(config, model, teacher, data, example, student_trace, teacher_trace)
        else:
            # DistributedDataParallel waits for the gradient of every parameter that is not frozen
            for name in student_trace.unreached:
                model.get_parameter(name).requires_grad_(False)
    with check("train.gradient_checkpointing"):
        if config.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
    with check("train.batch_size"):
        check_passes(config, terms)
    if is_quantised(config):
        quantise(model)
    if config.train.compile:
        model.compile()
    null = {**null_condition(model), **data.null}
    with check("losses.output.guidance_scale"):
        if not null and any(term.needs_null_prediction for term in terms.values()):
            raise ValueError("the models have no condition, hence none to guide by; remove it")
    return Parts(
        config, model, teacher, pipeline, data, process, terms, null, student_trace, teacher_trace, origins
    )


Check = Callable[[str], AbstractContextManager[None]]
"""What is wrong within it names the config file and this key."""


def _pipeline_for(
    config: TrainTeacherConfig | DistillConfig, teacher: Teacher | None, data: Source, check: Check
) -> PipelineFolder | None:
    """The pipeline that the model is to stand in, which the data are for."""
    with check("pipeline" if teacher is None else "teacher.path"):
        pipeline = None if teacher is None else teacher.pipeline
        if isinstance(config, TrainTeacherConfig) and config.pipeline is not None:
            pipeline = _open_pipeline(config.pipeline)
        if pipeline is not None:
            check_latent_space(pipeline, data)
    with check("data.caption_column"):
        check_prompts(pipeline, data)
    with check(""):
        if isinstance(data, LatentSource) and config.prepare is not None:
            check_prepared(data, config.data, config.prepare)
    return pipeline


def _forward_process(
    config: RunConfig, teacher: Teacher | None, pipeline: PipelineFolder | None, predicts_variance: bool
) -> ForwardProcess:
    """That of the teacher, else of the pipeline, as far as the config says nothing else."""
    of_pipeline = pipeline.load_scheduler() if teacher is None and pipeline is not None else None
    present = of_pipeline if teacher is None else teacher.scheduler
    return ForwardProcess.from_scheduler(scheduler_for(config.diffusion, present, predicts_variance))


def _initialise(
    config: DistillConfig,
    student: ModelMixin,
    teacher: ModelMixin,
    student_trace: Trace,
    teacher_trace: Trace,
) -> dict[str, str]:
    """Give a student its teacher's weights, if it is to begin with them.

    Returns:
        Where it is to be squeezed, which takes a pass over data: the teacher's block of each of its own.

    Raises:
        ValueError: the teacher has no weights for it.
    """
    layer_map = config.losses["shd"].layer_map  # type: ignore[attr-defined]
    if config.student.init == "teacher":
        taken = init_from_teacher(student, teacher, student_trace, teacher_trace, layer_map)
        if processes().is_main_process:
            announce(f"student.init: {taken}")
    if config.student.init != "squeeze":
        return {}
    pairs = paired_blocks(student_trace, teacher_trace, layer_map)
    origins = {block: by for block, by in pairs.items() if by is not None}
    check_can_be_squeezed_into(student, teacher, origins)
    return origins


def _terms(
    config: TrainTeacherConfig | DistillConfig,
    student: Trace,
    teacher: Trace | None,
    process: ForwardProcess,
    sizes: int,
    check: Check,
) -> dict[str, Term]:
    """The terms of the loss, which fit the models, so many sizes of images, and the timesteps."""
    with check(""):
        try:
            terms = build_terms(config.losses, student, teacher, config.seed)
        except ValueError as error:
            of_teacher = f" (teacher {config.teacher.path})" if isinstance(config, DistillConfig) else ""
            raise ValueError(f"key {error}{of_teacher}") from error
    with check("losses.features.projector"):
        check_projectors(terms, sizes, config.train.mask_ratio)
    if isinstance(shd := terms.get("shd"), SHD):
        with check("losses.shd.pairing"):
            shd.take_plans(squeezed_by(config))
        with check("losses.shd.timesteps"):
            check_timesteps(shd, process)
    return terms


def _try_masked(
    config: TrainTeacherConfig | DistillConfig,
    model: ModelMixin,
    teacher: Teacher | None,
    data: Source,
    example: dict[str, Tensor],
    student_trace: Trace,
    teacher_trace: Trace | None,
) -> None:
    """See that the models, and the terms of the loss, can do without the tokens that a mask hides.

    Raises:
        ValueError: they cannot.
    """
    check_masking(model, teacher, config.train.mask_ratio)
    student = _trace_masked(model, data, example, student_trace)
    masked_teacher = None
    if teacher is not None and teacher_trace is not None:
        masked_teacher = _trace_masked(teacher.model, data, example, teacher_trace)
    build_terms(config.losses, student, masked_teacher, config.seed)


def check_data(model: ModelMixin, pipeline: PipelineFolder | None, data: Source) -> Trace:
    """See that data are for a model and the pipeline that it stands in; they are given the conditions that it takes.

    Returns:
        What a pass of the model looks like.

    Raises:
        ValueError: they are not.
    """
    if pipeline is not None:
        check_latent_space(pipeline, data)
    check_prompts(pipeline, data)
    data.condition_names = conditions_of(model, data)
    example = data.example()
    return _trace(model, data, {name: example[name] for name in data.condition_names})


def teacher_rate(config: RunConfig) -> float | None:
    """The learning rate of a teacher that trains too."""
    return config.teacher.learning_rate if isinstance(config, DistillConfig) else None


def is_quantised(config: RunConfig) -> bool:
    """Whether the model is trained for 8 bits."""
    return isinstance(config, DistillConfig) and config.student.quantise is not None


def squeezed_by(config: TrainTeacherConfig | DistillConfig) -> dict[str, BlockPlan]:
    """By block, the plans by which a student's heads merged before it is trained; none where it was not squeezed.

    They lie beside the model, or where that is a run's pipeline in the run.
    """
    path = config.student.pretrained if isinstance(config, DistillConfig) else None
    if path is None:
        return {}
    folder = Path(first_of(path))
    file = (folder.parent if folder.name == PIPELINE else folder) / PLANS_FILE
    return read_plans(file) if file.is_file() else {}


def read_plans(file: Path) -> dict[str, BlockPlan]:
    """The merge plans of a `merge_plans.json`, by student block.

    Raises:
        UserError: it is damaged.
    """
    return read_as(file, dict[str, StoredPlan])


@contextmanager
def _naming(source: str, key: str) -> Iterator[None]:
    """What is wrong in here is an error that names the config file and the key."""
    try:
        yield
    except (ValueError, UserError) as error:
        raise UserError(f"{source}: {f'key `{key}`: ' if key else ''}{error}") from error


def model_section(config: TrainTeacherConfig | DistillConfig) -> tuple[str, ModelConfig]:
    """The key of the model that is trained, and what the config says of it."""
    return ("student", config.student) if isinstance(config, DistillConfig) else ("model", config.model)


def new_model(config: RunConfig, model: ModelConfig) -> ModelMixin:
    """The model of a config, with weights that follow from its seed: the same for every variant of one seed.

    Raises:
        ValueError: it cannot be built.
        UserError: the one that it is like has no config.
    """
    model = fill_in(model, config.within)
    torch.manual_seed(config.seed)
    return build_model(model)


def open_model(name: str) -> ModelMixin:
    """As `load_model`, or the new model of a config file of `train-teacher` or `distill`.

    Raises:
        UserError: there is no such model or config, or it cannot be built.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        return load_model(name)
    config = read_run_config(path)
    try:
        return new_model(config, model_section(config)[1])
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error


def conditions_of(model: ModelMixin, data: Source) -> list[str]:
    """The conditions that the data have and the model takes: an unconditional one is trained without their labels."""
    without = {"class_labels"} if num_classes(model) is None else set()
    return [name for name in data.condition_names if name not in without]


def _trace(model: ModelMixin, data: Source, example: dict[str, Tensor]) -> Trace:
    """What a pass on the data looks like, given the condition of one sample.

    Raises:
        ValueError: the model does not take them, or puts out something else than what it is given.
    """
    found = trace(model, data.shape, example)
    channels, *size = data.shape
    if found.output.shape[1] not in (channels, 2 * channels) or list(found.output.shape[2:]) != size:
        raise ValueError(
            f"{type(model).__name__} makes {tuple(found.output.shape[1:])} of samples {data.shape}; it must put out "
            "what it takes, or twice as many channels"
        )
    return found


def _trace_masked(model: ModelMixin, data: Source, example: dict[str, Tensor], plain: Trace) -> Trace:
    """What a masked pass looks like in a plain one's blocks, with one token left out: so many make no grid."""
    kept = {"ids_keep": torch.zeros(1, num_tokens(model) - 1, dtype=torch.long)}
    masked = trace(model, data.shape, {**example, **kept})
    return replace(masked, records={name: masked.records[name] for name in plain.records})


def _open_pipeline(name: str) -> PipelineFolder:
    """The text-to-image pipeline that a new model is trained for.

    Raises:
        ValueError: there is none.
    """
    pipeline = find_pipeline(name)
    if pipeline is None or not pipeline.takes_prompts:
        raise ValueError(f"{name}: no text-to-image pipeline; give the folder or hub name of one, or none")
    return pipeline
