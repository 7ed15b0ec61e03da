"""`--dry-run`: build what a config names, count what a step costs, and take two real ones where they fit.

Nothing is written, and neither data nor weights are read: whether they are there, the run itself will tell.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from rich.console import Console, Group
from rich.table import Table

from shd_diffusion.config import DistillConfig, TrainConfig, TrainTeacherConfig, read_run_config
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.losses.shd import SHD
from shd_diffusion.models.denoiser import count_parameters, freeze
from shd_diffusion.models.factory import ModelConfig, cast, empty_model
from shd_diffusion.models.pipeline_folder import find_pipeline
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.progress import announce
from shd_diffusion.shipped import find_config
from shd_diffusion.squeezing.plan import members, plan_merges
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import Parts, build, model_section
from shd_diffusion.training.count import (
    PassCount,
    count_passes,
    materialised,
    training_loss,
)
from shd_diffusion.training.inspect_models import render, render_pair, rows_of
from shd_diffusion.training.launch import make_accelerator
from shd_diffusion.training.loop import take_step
from shd_diffusion.training.made_up import MadeUpSamples, make_up_samples
from shd_diffusion.training.memory import memory
from shd_diffusion.training.objectives import TrainingLoss
from shd_diffusion.training.run import place_models
from shd_diffusion.training.train_state import TrainState

SECONDS = 30.0  # that the last step may take
SHARE_OF_MEMORY = 0.5  # of what is free, that a real step may take
OPERATIONS = 1e12  # of one image that a CPU may take: half a minute or so on one core

Config = TrainTeacherConfig | DistillConfig


def dry_run(config: Config, source: str) -> dict[str, Any]:
    """Build, count and measure, print tables on standard error, and return the numbers, ready for JSON.

    Of a teacher only the configs are read, at `teacher.config` if that is set.

    Raises:
        UserError: the config cannot be carried out.
    """
    announce("dry run: made-up samples; neither data nor weights are read, nothing is written")
    if isinstance(config, DistillConfig) and config.teacher.config is not None:
        path = str(find_config(Path(config.teacher.config)))
        teacher = config.teacher.model_copy(update={"path": path})
        config = config.model_copy(update={"teacher": teacher})
    train = config.train
    alone = config.model_copy(update={"train": _alone(train)})
    accelerator = make_accelerator(alone.train, Path())
    if accelerator.num_processes > 1:
        raise UserError("--dry-run: it is for one process, and tells what each of several would need")
    parts = build_empty(alone, source)
    share = BatchLayout(train.batch_size, train.micro_batch_size, train.num_processes or 1).passes[0].stop
    counts = count_passes(parts, share, accelerator)
    counted = counts[train.gradient_checkpointing]
    forward = dict(zip(("forward", "teacher_forward"), (n // share for n in counted.forward), strict=False))
    one_image = memory(parts, counted.activations // share, counted.extra_parameters)["sum"]
    reason = why_not_measured(one_image, counted.operations // share, accelerator)
    if reason is None:
        announce(
            f"operations and memory are counted; seconds are measured, in two steps on {accelerator.device}"
        )
        measured = measure(parts, share, counted.activations // share, accelerator)
    else:
        announce(f"operations and memory are counted, and nothing is measured: {reason}")
        measured = None
    found: dict[str, Any] = {
        "config": source,
        "environment": describe_environment(),
        "student" if parts.teacher else "model": _describe(parts.model),
        **({"teacher": _describe(parts.teacher.model)} if parts.teacher else {}),
        "sample": list(parts.data.shape),
        "condition": {name: list(value.shape[1:]) for name, value in parts.data.example().items()},
        "merge_plan": describe_plan(parts),
        "images_per_pass": share,
        "memory_bytes": memory_of_run(parts, counted, train),
        "memory_bytes_by_option": memory_by_option(parts, counts, train.num_processes or 1),
        "operations_per_image": {**forward, "training": counted.operations // share},
        "measured": measured,
        "run": estimate(train, counted.operations // share, measured),
    }
    show(found, parts)
    return found


# --- building ------------------------------------------------------------------------------------------------


def build_empty(config: Config, source: str) -> Parts:
    """What a config names, on made-up samples, with models that have no weights.

    Raises:
        UserError: it cannot be built.
    """
    key, section = model_section(config)
    teacher = _open_teacher(config, source) if isinstance(config, DistillConfig) else None
    try:
        model = empty_model(section, None if _is_config(config.within) else config.within)
    except ValueError as error:
        raise UserError(f"{source}: key `{key}`: {error}") from error
    try:
        samples = make_up_samples(config, model)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if isinstance(config, TrainTeacherConfig):  # only data that are not made up can fit its pipeline
        config = config.model_copy(update={"pipeline": None})
    return build(config, source, samples, teacher, model)


def _open_teacher(config: DistillConfig, source: str) -> Teacher:
    """A teacher without weights, with its pipeline's scheduler; or the one that a config of `train-teacher` makes."""
    path, dtype = config.teacher.path, getattr(torch, config.teacher.dtype)
    try:
        if _is_config(path):
            announce(f"teacher.path: {path} is a config: a teacher of its sizes")
            of_teacher = read_run_config(Path(path))
            model = empty_model(model_section(of_teacher)[1], of_teacher.within)
            return Teacher(freeze(cast(model, dtype)))
        model = empty_model(ModelConfig(pretrained=path))
        pipeline = find_pipeline(path)
        scheduler = None if pipeline is None else pipeline.load_scheduler()
        return Teacher(freeze(cast(model, dtype)), scheduler=scheduler)
    except (ValueError, UserError) as error:
        raise UserError(
            f"{source}: key `teacher.path`: {error}; a dry run needs its configs alone: set `teacher.config` to a "
            "folder with them, or to a config of train-teacher"
        ) from error


def _is_config(path: str | None) -> bool:
    return path is not None and Path(path).suffix in (".yaml", ".yml")


def _alone(train: TrainConfig) -> TrainConfig:
    """The optimisation as one process does it, without what only a long run wants."""
    return train.model_copy(update={"num_processes": None, "shard": False, "compile": False, "trackers": []})


# --- measuring -----------------------------------------------------------------------------------------------


def why_not_measured(memory_bytes: int, operations: int, accelerator: Accelerator) -> str | None:
    """Why no real step is taken for one image; None where it is."""
    free = _free_memory(accelerator)
    if memory_bytes > SHARE_OF_MEMORY * free:
        return f"a step of one image needs {memory_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    if accelerator.device.type == "cpu" and operations > OPERATIONS:
        return f"a step of one image is {operations:.1e} operations, too many for a CPU"
    return None


def measure(parts: Parts, most: int, activations: int, accelerator: Accelerator) -> dict[str, Any]:
    """Two optimiser steps with random weights: one image to warm up, and as many as this machine can soon take.

    Args:
        most: images of the last step.
        activations: bytes that one image makes.
    """
    parts = materialised(parts, torch.device("cpu"))
    if parts.config.train.gradient_checkpointing:
        parts.model.enable_gradient_checkpointing()
    place_models(parts, accelerator)
    for term in parts.terms.values():
        term.to(accelerator.device)
    loss = training_loss(parts)
    teacher = loss.teacher_parameters(), loss.teacher_rate
    state = TrainState.prepare(parts.model, loss.parameters(), parts.config.train, accelerator, teacher)
    state.wrapped.train()
    with loss:
        first, _ = _step(parts, 1, loss, state, accelerator)
        room = SHARE_OF_MEMORY * _free_memory(accelerator) / max(activations, 1)
        images = max(1, min(most, int(SECONDS / first), int(room)))
        seconds, terms = _step(parts, images, loss, state, accelerator)
    return {
        "images": images,
        "seconds": seconds,
        "seconds_per_image": seconds / images,
        "terms": terms,
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        "peak_bytes": _peak_memory(accelerator),
    }


def _step(
    parts: Parts, images: int, loss: TrainingLoss, state: TrainState, accelerator: Accelerator
) -> tuple[float, dict[str, float]]:
    """Seconds of one optimiser step on so many images, at which most terms count, and the terms of its loss."""
    assert isinstance(parts.data, MadeUpSamples)
    layout, step = BatchLayout(images), loss.fullest_step
    batches = replace(parts, data=parts.data.of(images)).loader(accelerator.device)(layout, 0).step(0)
    began = time.perf_counter()
    terms, _ = take_step(state, loss, batches, layout.num_passes, step, parts.config.train, accelerator)
    values = {name: float(term) for name, term in terms.items()}  # waits for the device
    return time.perf_counter() - began, values


def _free_memory(accelerator: Accelerator) -> int:
    if accelerator.device.type == "cuda":
        return torch.cuda.mem_get_info(accelerator.device)[0]
    return psutil.virtual_memory().available


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
    shd = parts.terms.get("shd")
    if not isinstance(shd, SHD):
        return []
    described = []
    for name, heads in shd.heads.items():
        plan = plan_merges(*heads)
        described.append(
            {
                "student": name,
                "teacher": shd.pairs[name],
                "heads": [heads[0], *map(len, plan)],
                "merged": [list(group) for group in members(plan, heads[0])],
            }
        )
    return described


def memory_of_run(parts: Parts, counted: PassCount, train: TrainConfig) -> dict[str, int]:
    """Bytes of one process as the config has it."""
    processes = (train.num_processes or 1) if train.shard else 1
    return memory(parts, counted.activations, counted.extra_parameters, processes)


def memory_by_option(parts: Parts, counts: dict[bool, PassCount], processes: int) -> dict[str, int]:
    """Bytes of one process with and without gradient checkpointing, and sharded over all processes if several."""
    sums = {}
    for again, name in ((False, "plain"), (True, "gradient_checkpointing")):
        count = counts[again].activations, counts[again].extra_parameters
        sums[name] = memory(parts, *count)["sum"]
        if processes > 1:
            sums[f"{name}, sharded"] = memory(parts, *count, processes)["sum"]
    return sums


def estimate(train: TrainConfig, operations: int, measured: dict[str, Any] | None) -> dict[str, Any]:
    """The whole run: images, operations, and how long this machine would take alone, if that was measured."""
    images = train.max_steps * train.batch_size
    return {
        "steps": train.max_steps,
        "images_per_step": train.batch_size,
        "images": images,
        "operations": images * operations,
        "seconds_per_step_here": measured and train.batch_size * measured["seconds_per_image"],
        "seconds_here": measured and images * measured["seconds_per_image"],
    }


def show(found: dict[str, Any], parts: Parts) -> None:
    """Print the models, the merge plan and the costs for a person."""
    student = rows_of(parts.model, parts.student_trace.records)
    tables = [render(parts.model, student)]
    if parts.teacher is not None and parts.teacher_trace is not None:
        teacher = rows_of(parts.teacher.model, parts.teacher_trace.records)
        tables = [render(parts.teacher.model, teacher), *tables]
        if shd := parts.terms.get("shd"):
            tables.append(render_pair(teacher, student, shd.pairs))
    measured, run = found["measured"], found["run"]
    costs = Table(title="costs", title_justify="left", show_header=False)
    costs.add_row("images a pass", f"{found['images_per_pass']:,}")
    for name, size in found["memory_bytes"].items():
        costs.add_row(f"memory: {name}", _gigabytes(size))
    for name, size in found["memory_bytes_by_option"].items():
        costs.add_row(f"memory, {name}", _gigabytes(size))
    for name, count in found["operations_per_image"].items():
        costs.add_row(f"operations an image: {name}", f"{count:.3g}")
    costs.add_row("images a step", f"{run['images_per_step']:,}")
    costs.add_row(f"all {run['steps']:,} steps, operations", f"{run['operations']:.3g}")
    if measured is not None:
        costs.add_row(
            f"measured: peak with {measured['images']} images a step", _gigabytes(measured["peak_bytes"])
        )
        costs.add_row("measured: seconds a step, this machine alone", f"{run['seconds_per_step_here']:,.2f}")
        costs.add_row("all steps, this machine alone", f"{run['seconds_here'] / 3600:,.2f} h")
    Console(stderr=True).print(Group(*tables, costs))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3f} GB"
