"""Everything that a config names, built and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.compression.narrow import check_can_be_squeezed_into
from shd_diffusion.config import DistillConfig, RunConfig, TrainTeacherConfig, read_run_config
from shd_diffusion.data import DataConfig, LatentSource, Source, open_dataset
from shd_diffusion.data.latent_space import load_vae
from shd_diffusion.data.prepare import EncodeConfig
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_as
from shd_diffusion.hashing import hash_model
from shd_diffusion.losses import Term, build_terms
from shd_diffusion.losses.attention_projector import CrossAttentionProjector
from shd_diffusion.losses.shd import SHD
from shd_diffusion.models.denoiser import null_condition, num_classes, num_tokens
from shd_diffusion.models.factory import ModelConfig, build_model, fill_in, first_of, load_model
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.mdtv2 import num_kept_tokens
from shd_diffusion.models.pipeline_folder import PipelineFolder, find_pipeline
from shd_diffusion.models.quantised import quantise
from shd_diffusion.models.teacher import Teacher, load_teacher, scheduler_for
from shd_diffusion.models.trace import Trace, trace
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce
from shd_diffusion.squeezing.plan import PLANS_FILE, Plan, parse_plan
from shd_diffusion.training.batches import BatchLayout, BatchLoader, noise_settings
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
    with check("teacher.path" if teacher is not None else "pipeline"):
        pipeline = None if teacher is None else teacher.pipeline
        if isinstance(config, TrainTeacherConfig) and config.pipeline is not None:
            pipeline = _open_pipeline(config.pipeline)
        if pipeline is not None:
            _check_latent_space(pipeline, data)
    with check("data.caption_column"):
        _check_prompts(pipeline, data)
    with check(""):
        if isinstance(data, LatentSource) and config.prepare is not None:
            _check_prepared(data, config.data, config.prepare)
    with check("data.path"):
        example = data.example()
    with check(key):
        model = new_model(config, model_config) if model is None else model
        data = copy(data)
        data.condition_names = conditions_of(model, data)
        example = {name: example[name] for name in data.condition_names}
        student_trace = _trace(model, data, example)
        _check_classes(model, data)
    teacher_trace = None
    with check("teacher.path"):
        if teacher is not None and isinstance(config, DistillConfig):
            _check_pair(teacher, model, config.teacher.path)
            teacher_trace = _trace(teacher.model, data, example)
    with check("train.guidance_range"):
        _check_guidance(config.train.guidance_range, example)
    with check("teacher.learning_rate"):
        if teacher is not None and teacher_rate(config) is not None:
            _check_co_training(config)
            teacher.model.requires_grad_(True)
    with check(""):
        present = pipeline.load_scheduler() if teacher is None and pipeline is not None else None
        present = teacher.scheduler if teacher is not None else present
        scheduler = scheduler_for(config.diffusion, present, student_trace.predicts_variance)
        process = ForwardProcess.from_scheduler(scheduler)
    with check(f"{key}.arguments"):
        if student_trace.predicts_variance and not _has_a_bound(process):
            raise ValueError(
                "a variance is predicted, which a flow, or noise without any signal, has no bound for; set "
                "`out_channels` to `in_channels`"
            )
    with check("student.init"):
        origins: dict[str, str] = {}
        if isinstance(config, DistillConfig) and teacher is not None and teacher_trace is not None:
            layer_map = config.losses["shd"].layer_map  # type: ignore[attr-defined]
            if config.student.init == "teacher":
                taken = init_from_teacher(model, teacher.model, student_trace, teacher_trace, layer_map)
                if processes().is_main_process:
                    announce(f"student.init: {taken}")
            elif config.student.init == "squeeze":
                pairs = paired_blocks(student_trace, teacher_trace, layer_map)
                origins = {block: by for block, by in pairs.items() if by is not None}
                check_can_be_squeezed_into(model, teacher.model, origins)
    with check(""):
        try:
            terms = build_terms(config.losses, student_trace, teacher_trace, config.seed)
        except ValueError as error:
            of_teacher = f" (teacher {config.teacher.path})" if isinstance(config, DistillConfig) else ""
            raise ValueError(f"key {error}{of_teacher}") from error
    with check("losses.features.projector"):
        if any(isinstance(module, CrossAttentionProjector) for t in terms.values() for module in t.modules()):
            if len(data.groups) > 1:
                raise ValueError(
                    "`attention` is for images of one size, and the cache has several; set `linear`"
                )
            if config.train.mask_ratio:
                raise ValueError(
                    "`attention` is for all tokens, and `train.mask_ratio` hides some; set `linear`"
                )
    with check("losses.shd.pairing"):
        if isinstance(shd := terms.get("shd"), SHD):
            shd.take_plans(squeezed_by(config))
    with check("losses.shd.timesteps"):
        limits = shd.config.timesteps if isinstance(shd, SHD) else None
        if limits is not None and not 0 <= limits[0] < process.num_timesteps:
            raise ValueError(
                f"{limits} hold none of the timesteps, 0 to {process.num_timesteps - 1}; SHD would never count"
            )
    with check("train.mask_ratio"):
        _check_masking(model, teacher, config.train.mask_ratio)
        if config.train.mask_ratio:
            masked = None
            if teacher is not None and teacher_trace is not None:
                masked = _trace_masked(teacher.model, data, example, teacher_trace)
            build_terms(
                config.losses, _trace_masked(model, data, example, student_trace), masked, config.seed
            )
        if not config.train.mask_ratio:
            # DistributedDataParallel waits for the gradient of every parameter that is not frozen
            for name in student_trace.unreached:
                model.get_parameter(name).requires_grad_(False)
    with check("train.gradient_checkpointing"):
        if config.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
    with check("train.batch_size"):
        _check_passes(config, terms)
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


def check_data(model: ModelMixin, pipeline: PipelineFolder | None, data: Source) -> Trace:
    """See that data are for a model and the pipeline that it stands in; they are given the conditions that it takes.

    Returns:
        What a pass of the model looks like.

    Raises:
        ValueError: they are not.
    """
    if pipeline is not None:
        _check_latent_space(pipeline, data)
    _check_prompts(pipeline, data)
    data.condition_names = conditions_of(model, data)
    example = data.example()
    return _trace(model, data, {name: example[name] for name in data.condition_names})


def teacher_rate(config: RunConfig) -> float | None:
    """The learning rate of a teacher that trains too."""
    return config.teacher.learning_rate if isinstance(config, DistillConfig) else None


def is_quantised(config: RunConfig) -> bool:
    """Whether the model is trained for 8 bits."""
    return isinstance(config, DistillConfig) and config.student.quantise is not None


def squeezed_by(config: TrainTeacherConfig | DistillConfig) -> dict[str, Plan]:
    """By block, the plans by which a student's heads merged before it is trained; none where it was not squeezed."""
    path = config.student.pretrained if isinstance(config, DistillConfig) else None
    file = None if path is None else Path(first_of(path)) / PLANS_FILE
    return {} if file is None or not file.is_file() else read_plans(file)


def read_plans(file: Path) -> dict[str, Plan]:
    """The merge plans of a `merge_plans.json`, by block.

    Raises:
        UserError: it is damaged.
    """
    return {name: parse_plan(plan) for name, plan in read_as(file, dict[str, list[list[list[int]]]]).items()}


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


def _has_a_bound(process: ForwardProcess) -> bool:
    """Whether the variational bound of a predicted variance is finite at every timestep."""
    if process.table is None:
        return False
    return process.objective != "epsilon" or bool(process.table[0].min() > 0)


def _trace_masked(model: ModelMixin, data: Source, example: dict[str, Tensor], plain: Trace) -> Trace:
    """What a masked pass looks like in a plain one's blocks, with one token left out: so many make no grid."""
    kept = {"ids_keep": torch.zeros(1, num_tokens(model) - 1, dtype=torch.long)}
    masked = trace(model, data.shape, {**example, **kept})
    return replace(masked, records={name: masked.records[name] for name in plain.records})


def _check_classes(model: ModelMixin, data: Source) -> None:
    """See that labels mean the same to both."""
    classes = num_classes(model)
    if classes is not None and classes != data.num_classes:
        raise ValueError(
            f"a model of {classes} classes, but `data` has {data.num_classes or 'none'}; make them equal"
        )


def _check_pair(teacher: Teacher, student: ModelMixin, path: str) -> None:
    """See that both are conditioned on the same."""
    classes = num_classes(student), num_classes(teacher.model)
    if classes[0] != classes[1]:
        raise ValueError(
            f"{path} is a model of {classes[1] or 'no'} classes, but the student of {classes[0] or 'none'}; "
            "make them equal"
        )


def _open_pipeline(name: str) -> PipelineFolder:
    """The text-to-image pipeline that a new model is trained for.

    Raises:
        ValueError: there is none.
    """
    pipeline = find_pipeline(name)
    if pipeline is None or not pipeline.takes_prompts:
        raise ValueError(f"{name}: no text-to-image pipeline; give the folder or hub name of one, or none")
    return pipeline


def _check_prompts(pipeline: PipelineFolder | None, data: Source) -> None:
    """See that the data have prompts where they are needed, encoded as the pipeline does.

    Raises:
        ValueError: they do not.
    """
    encoded = data.prompts_sha256 if isinstance(data, LatentSource) else None
    if pipeline is None or not pipeline.takes_prompts:
        if encoded is not None:
            raise ValueError(
                "the cache has captions, but the model stands in no text-to-image pipeline; set `pipeline`, or "
                "prepare the data without captions"
            )
        return
    if encoded is None:
        raise ValueError(
            f"{pipeline.name} makes images from prompts; name where the captions are, add a section `prepare`, and "
            "run `shd-diffusion prepare` first"
        )
    if encoded != pipeline.hash_prompt_parts():
        raise ValueError(
            f"the captions in the cache were encoded by other text encoders or tokenizers than {pipeline.name} has; "
            "run `shd-diffusion prepare` with another `prepare.output`"
        )


def _check_co_training(config: RunConfig) -> None:
    """See that a teacher can train too.

    Raises:
        ValueError: it cannot; the message names the other key.
    """
    assert isinstance(config, DistillConfig)
    hindrances = {
        "`train.shard` leaves no room for it: set it to false": config.train.shard,
        "`teacher.device` must be accelerator": config.teacher.device == "cpu",
        "`teacher.dtype` must be float32": config.teacher.dtype != "float32",
        "`train.mix` would have it learn mixed images: set it to none": config.train.mix != "none",
    }
    for hindrance, present in hindrances.items():
        if present:
            raise ValueError(
                f"a teacher that trains too wants other settings: {hindrance}; or remove this key"
            )


NOT_OF_IMAGES = {"path", "horizontal_flip", "verify", "num_workers"}
"""Keys of data that change no image."""


def _check_prepared(cache: LatentSource, images: DataConfig, settings: EncodeConfig) -> None:
    """See that a cache was made of the images that a config names, which need not be on this machine, and as far as the
    config says so in the way that it names.

    Raises:
        ValueError: it was made of others, or otherwise.
    """
    asked = {f"data.{key}": value for key, value in images.model_dump().items() if key not in NOT_OF_IMAGES}
    made = {f"data.{key}": value for key, value in cache.images.items()}
    asked |= {
        f"prepare.{key}": value for key, value in settings.model_dump(include=settings.changed()).items()
    }
    made |= {f"prepare.{key}": value for key, value in cache.encoded.items()}
    for key, value in asked.items():
        if made.get(key, value) != value:
            raise ValueError(
                f"key `{key}`: is {value!r}, but the cache was made with {made[key]!r}; set it so, or "
                "prepare another one (`prepare.output`)"
            )
    moved = images.path is not None and images.path != cache.images.get("path") and Path(images.path).exists()
    if moved and open_dataset(images).fingerprint() != cache.images_sha256:
        raise ValueError(
            f"key `data.path`: {images.path} has other images than the cache was made of "
            f"({cache.images.get('path')}); set it so, or prepare another one (`prepare.output`)"
        )


def _check_passes(config: RunConfig, terms: Mapping[str, Term]) -> None:
    """See that every pass has as many images as terms of a batch need, and mixing does.

    Raises:
        ValueError: too few, which would be a loss of 0 without a word, or fewer than there are processes.
    """
    train, num_processes = config.train, processes().num_processes
    layouts = [
        BatchLayout(train.batch_size, train.micro_batch_size, num_processes, process)
        for process in range(num_processes)
    ]
    smallest = min(len(places) for layout in layouts for places in layout.passes)
    needed = {f"losses.{name}": term.fewest_samples for name, term in terms.items()}
    needed |= {} if train.mix == "none" else {"train.mix": 2}
    for what, fewest in needed.items():
        if smallest < fewest:
            raise ValueError(
                f"`{what}` compares {fewest} images of a pass or more, and some have {smallest}; raise `batch_size` or "
                "`micro_batch_size`"
            )


def _check_guidance(guidance_range: list[float] | None, example: dict[str, Tensor]) -> None:
    """See that a guidance scale is told to the models that want one.

    Raises:
        ValueError: it is not, or to others.
    """
    if "guidance" in example:
        if guidance_range is None:
            raise ValueError(
                "the model is told the guidance scale, so train it on those that it will be used with; give the "
                "least and the largest, such as [1, 5]"
            )
        if guidance_range[0] > guidance_range[1]:
            raise ValueError(f"{guidance_range} ends before it begins; give the least and the largest")
    elif guidance_range is not None:
        raise ValueError("the model is told no guidance scale; remove it")


def _check_latent_space(pipeline: PipelineFolder, data: Source) -> None:
    """See that the data are in the space that the teacher was trained in, and of its size.

    Raises:
        ValueError: they are not, as far as the teacher's pipeline tells.
    """
    path = pipeline.name
    if pipeline.sample_shape not in (None, tuple(data.shape)):
        raise ValueError(
            f"{path} was trained on samples {pipeline.sample_shape}, but `data` gives {tuple(data.shape)}; make "
            "them equal"
        )
    if not isinstance(data, LatentSource):
        if pipeline.has("vae"):
            raise ValueError(
                f"{path} works on latents, but `data` gives pixels; run `shd-diffusion prepare` first"
            )
        return
    if not pipeline.has("vae"):
        raise ValueError(f"{path} works on pixels, but `data` gives latents; give the images themselves")
    if hash_model(load_vae(path)) != data.vae_sha256:
        raise ValueError(
            f"{path} works on latents of its own VAE, but `data.path` was encoded by another ({data.vae}); "
            "prepare the data with the teacher's"
        )


def _check_masking(model: ModelMixin, teacher: Teacher | None, mask_ratio: float) -> None:
    """See that the models can be trained masked, if they are to be.

    Raises:
        ValueError: a model takes no token mask, the teacher's tokens are others, or none could be left.
    """
    if not mask_ratio:
        return
    tokens = num_tokens(model)
    num_kept_tokens(tokens, mask_ratio, torch.Generator())
    if teacher is not None and (other := num_tokens(teacher.model)) != tokens:
        raise ValueError(f"one mask cannot be for {tokens} tokens of the student and {other} of the teacher")
