"""`--dry-run`: build what a config names, take a few real steps on made-up samples, and say what the run will cost.

Nothing is written and no data are read: whether they are there, the run itself will tell.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from rich.console import Console, Group
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from shd_diffusion.config import DistillConfig, TrainConfig, TrainTeacherConfig
from shd_diffusion.data import Source
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.models.denoiser import count_parameters, freeze, num_classes, predict, sample_shape
from shd_diffusion.models.teacher import Teacher, load_teacher
from shd_diffusion.operations import kept_for_backward, operation_counter
from shd_diffusion.progress import announce
from shd_diffusion.squeezing.plan import members, plan_merges
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import Parts, build, model_section, new_model, open_model
from shd_diffusion.training.inspect_models import inspect_model, render, render_pair
from shd_diffusion.training.launch import make_accelerator
from shd_diffusion.training.loop import take_step
from shd_diffusion.training.objectives import TrainingLoss
from shd_diffusion.training.run import place_teacher
from shd_diffusion.training.train_state import TrainState

SECONDS = 30.0  # that the last step may take
SHARE_OF_MEMORY = 0.25  # of what is free, that its activations may take

Config = TrainTeacherConfig | DistillConfig


def dry_run(config: Config, source: str) -> dict[str, Any]:
    """Build and measure, print tables on standard error, and return the measurements, ready for JSON.

    `teacher.path` may also be a config of `train-teacher`, for a teacher that is not on disk: its sizes count,
    its weights are random.

    Raises:
        UserError: the config cannot be carried out.
    """
    announce("dry run: made-up samples, no data are read, nothing is written")
    small = config.model_copy(update={"train": _alone(config.train, images=1)})
    accelerator = make_accelerator(small.train, Path())
    if accelerator.num_processes > 1:
        raise UserError("--dry-run: it is for one process, and tells what each of several would need")
    teacher = _open_teacher(config, source) if isinstance(config, DistillConfig) else None
    parts = build(small, source, MadeUpSamples(_model_to_ask(config, source)), teacher)
    if parts.teacher is not None and isinstance(small, DistillConfig):
        place_teacher(parts.teacher.model, small, accelerator)
    parts.model.to(accelerator.device)
    train = config.train
    share = BatchLayout(train.batch_size, train.micro_batch_size, train.num_processes or 1).passes[0].stop
    measured = measure(parts, share, accelerator)
    counted = {"forward": count_forward(parts, parts.model)}
    if parts.teacher is not None:
        counted["teacher_forward"] = count_forward(parts, parts.teacher.model)
    found: dict[str, Any] = {
        "config": source,
        "environment": describe_environment(),
        "student" if parts.teacher else "model": _describe(parts.model),
        **({"teacher": _describe(parts.teacher.model)} if parts.teacher else {}),
        "merge_plan": describe_plan(parts),
        "memory_bytes": memory(parts, measured, share),
        "operations_per_image": {**counted, "training": measured["operations_per_image"]},
        "measured": measured,
        "run": estimate(config.train, measured),
    }
    show(found, parts)
    return found


# --- building ------------------------------------------------------------------------------------------------


def _model_to_ask(config: Config, source: str) -> ModelMixin:
    """The model that says what samples look like; on the meta device, without weights."""
    _, section = model_section(config)
    try:
        with nullcontext() if section.pretrained else torch.device("meta"):
            return new_model(config, section)
    except ValueError as error:
        raise UserError(f"{source}: key `{model_section(config)[0]}`: {error}") from error


def _open_teacher(config: DistillConfig, source: str) -> Teacher:
    """The teacher that is on disk, or a new one of a config."""
    path = Path(config.teacher.path)
    try:
        if path.suffix not in (".yaml", ".yml"):
            return load_teacher(config.teacher)
        announce(f"teacher.path: {path} is a config: a teacher of its sizes with random weights")
        return Teacher(freeze(open_model(str(path))).to(getattr(torch, config.teacher.dtype)))
    except UserError as error:
        raise UserError(
            f"{source}: key `teacher.path`: {error}; a dry run also takes a config of train-teacher there"
        ) from error


def _alone(train: TrainConfig, images: int) -> TrainConfig:
    """The optimisation of so many images a step as one process does it, without what only a long run wants."""
    alone = {"micro_batch_size": None, "num_processes": None, "shard": False, "compile": False}
    return train.model_copy(update={"batch_size": images, "trackers": [], **alone})


class MadeUpSamples(Source):
    """Standard normal samples of a model's shape, with every class among the labels."""

    def __init__(self, model: ModelMixin, count: int = 1) -> None:
        shape = sample_shape(model)
        if shape is None:
            raise UserError(f"--dry-run: {type(model).__name__} has no `sample_size` in its config; add it")
        self.shape, self.image_size, self.num_classes = shape, shape[-2:], num_classes(model)
        self.needs_noise, self.num_workers, self.null = False, 0, {}
        self.condition_names = [] if self.num_classes is None else ["class_labels"]
        self.dataset = _Samples(shape, self.num_classes, count)

    def clean(self, items: Mapping[str, Tensor], flipped: Tensor, noise: Tensor | None = None) -> Tensor:
        return items["image"]

    def fingerprint(self) -> str:
        return "made up"

    def of(self, count: int) -> MadeUpSamples:
        """The same with so many samples."""
        other = copy(self)
        other.dataset = _Samples(self.shape, self.num_classes, count)
        return other


class _Samples(Dataset[dict[str, Tensor]]):
    def __init__(self, shape: tuple[int, ...], classes: int | None, count: int) -> None:
        self.images, self.classes = torch.randn(count, *shape), classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        label = {} if self.classes is None else {"class_labels": torch.tensor(index % self.classes)}
        return {"image": self.images[index], **label}


# --- measuring -----------------------------------------------------------------------------------------------


def measure(parts: Parts, most: int, accelerator: Accelerator) -> dict[str, Any]:
    """Three optimiser steps: one image to warm up, one to count, and as many as this machine can soon take to time.

    Args:
        most: images of the last step.
    """
    teacher = None if parts.teacher is None else parts.teacher.model
    for term in parts.terms.values():
        term.to(accelerator.device)
    loss = TrainingLoss(parts.process, parts.terms, parts.model, teacher, parts.config.train.max_steps)
    if loss.shd is not None:  # matched plans cost what adjacent ones do, once they are found
        loss.shd.loss.plans = {name: plan_merges(*heads) for name, heads in _heads(parts).items()}
    state = TrainState.prepare(parts.model, loss.parameters(), parts.config.train, accelerator)
    state.wrapped.train()
    with loss:
        before, _ = _step(parts, 1, loss, state, accelerator)
        parameters = [*state.model.parameters(), *state.aux_parameters]
        with operation_counter() as operations, kept_for_backward(parameters) as kept:
            counted, _ = _step(parts, 1, loss, state, accelerator)
        room = SHARE_OF_MEMORY * _free_memory(accelerator) / max(kept.bytes, 1)
        images = max(1, min(most, int(SECONDS / min(before, counted)), int(room)))
        seconds, terms = _step(parts, images, loss, state, accelerator)
    return {
        "images": images,
        "seconds": seconds,
        "seconds_per_image": seconds / images,
        "bytes_kept_per_image": kept.bytes,
        "operations_per_image": operations.get_total_flops(),
        "terms": terms,
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        "peak_bytes": _peak_memory(accelerator),
        "extra_parameters": sum(parameter.numel() for parameter in loss.parameters()),
    }


def _step(
    parts: Parts, images: int, loss: TrainingLoss, state: TrainState, accelerator: Accelerator
) -> tuple[float, dict[str, float]]:
    """Seconds of one optimiser step on so many images, and the terms of its loss."""
    assert isinstance(parts.data, MadeUpSamples)
    train = _alone(parts.config.train, images)
    layout = BatchLayout(images)
    batches = replace(parts, data=parts.data.of(images)).loader(accelerator.device)(layout, 0).step(0)
    began = time.perf_counter()
    terms, _ = take_step(state, loss, batches, layout.num_passes, 0, train, accelerator)
    values = {name: float(term) for name, term in terms.items()}  # waits for the device
    return time.perf_counter() - began, values


@torch.no_grad()
def count_forward(parts: Parts, model: ModelMixin) -> int:
    """Operations of one forward pass for one image."""
    noised = torch.randn(1, *parts.data.shape, device=model.device, dtype=model.dtype)
    zero = torch.zeros(1, dtype=torch.long, device=model.device)
    condition = {name: value.to(model.device) for name, value in parts.data.example().items()}
    with operation_counter() as operations:
        predict(model, noised, zero, condition)
    return operations.get_total_flops()


def _free_memory(accelerator: Accelerator) -> int:
    if accelerator.device.type == "cuda":
        return torch.cuda.mem_get_info(accelerator.device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _peak_memory(accelerator: Accelerator) -> int:
    """Bytes that were in use at most: on the accelerator, or by this process."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- telling -------------------------------------------------------------------------------------------------


def _describe(model: ModelMixin) -> dict[str, Any]:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"class": type(model).__name__, "parameters": count_parameters(model), "trained": trained}


def describe_plan(parts: Parts) -> list[dict[str, Any]]:
    """Every student block that learns by SHD, the heads after each round, and the teacher heads behind each.

    By adjacent pairing: matched plans are found when training begins, and differ in who merges only.
    """
    described = []
    for name, heads in _heads(parts).items():
        plan = plan_merges(*heads)
        described.append(
            {
                "student": name,
                "teacher": parts.terms["shd"].pairs[name],
                "heads": [heads[0], *map(len, plan)],
                "merged": [list(group) for group in members(plan, heads[0])],
            }
        )
    return described


def _heads(parts: Parts) -> dict[str, tuple[int, int]]:
    """The teacher's and the student's heads, by student block that learns by SHD."""
    shd = parts.terms.get("shd")
    if shd is None or parts.teacher_trace is None:
        return {}
    teacher, student = parts.teacher_trace.records, parts.student_trace.records
    return {name: (teacher[by].heads, student[name].heads) for name, by in shd.pairs.items()}


def memory(parts: Parts, measured: dict[str, Any], images: int) -> dict[str, int]:
    """Bytes of one process: what stays, and what a pass of so many images keeps for the backward pass.

    The latter from one image, an upper bound: what does not grow with the batch counts as often as there are images.
    """
    extra = 4 * measured["extra_parameters"]
    weights, trained = _bytes(parts.model, trained=False) + extra, _bytes(parts.model, trained=True) + extra
    sizes = {
        "teacher": _bytes(parts.teacher.model, trained=False) if parts.teacher else 0,
        "weights": weights,
        "gradients": trained,
        "optimiser": 2 * trained,  # AdamW's two moments
        "average": weights - extra,
        "activations": measured["bytes_kept_per_image"] * images,
    }
    return sizes | {"sum": sum(sizes.values())}


def _bytes(model: ModelMixin, trained: bool) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)


def estimate(train: TrainConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """The whole run: images, operations, and how long this machine would take alone."""
    images = train.max_steps * train.batch_size
    return {
        "steps": train.max_steps,
        "images_per_step": train.batch_size,
        "images": images,
        "operations": images * measured["operations_per_image"],
        "seconds_per_step_here": train.batch_size * measured["seconds_per_image"],
        "seconds_here": images * measured["seconds_per_image"],
    }


def show(found: dict[str, Any], parts: Parts) -> None:
    """Print the models, the merge plan and the costs for a person."""
    example = parts.data.shape, parts.data.example()
    student = inspect_model(parts.model, *example)
    tables = [render(parts.model, student)]
    if parts.teacher is not None:
        teacher = inspect_model(parts.teacher.model, *example)
        tables = [render(parts.teacher.model, teacher), *tables]
        if shd := parts.terms.get("shd"):
            tables.append(render_pair(teacher, student, shd.pairs))
    measured, run = found["measured"], found["run"]
    costs = Table(title="costs", title_justify="left", show_header=False)
    for name, size in found["memory_bytes"].items():
        costs.add_row(f"memory: {name}", _gigabytes(size))
    costs.add_row(f"peak with {measured['images']} images a step", _gigabytes(measured["peak_bytes"]))
    for name, count in found["operations_per_image"].items():
        costs.add_row(f"operations an image: {name}", f"{count:.3g}")
    costs.add_row("images a step", f"{run['images_per_step']:,}")
    costs.add_row("seconds a step, this machine alone", f"{run['seconds_per_step_here']:,.2f}")
    costs.add_row(f"all {run['steps']:,} steps, operations", f"{run['operations']:.3g}")
    costs.add_row(f"all {run['steps']:,} steps, this machine alone", f"{run['seconds_here'] / 3600:,.2f} h")
    Console(stderr=True).print(Group(*tables, costs))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3f} GB"
