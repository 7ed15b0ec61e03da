"""What a run costs, from what a dry run has measured: figures for a file, tables for a person."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin
from rich.console import Console, Group
from rich.table import Table

from shd_diffusion.config import DistillConfig, TrainConfig, TrainTeacherConfig
from shd_diffusion.models.adapter import count_parameters
from shd_diffusion.models.inspect import inspect_model, inspect_pair, render
from shd_diffusion.squeezing.plan import members

Figures = dict[str, Any]


def describe_model(model: ModelMixin) -> Figures:
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {"class": type(model).__name__, "parameters": count_parameters(model), "trained": trained}


def describe_plan(teacher: ModelMixin, student: ModelMixin, config: DistillConfig) -> list[Figures]:
    """Every student block that learns from one, the heads after each round, and the teacher heads behind each.

    By adjacent pairing: matched plans are found when training begins, and differ in who merges only.
    """
    if not config.losses.shd.weight:
        return []
    pairs = inspect_pair(inspect_model(teacher), inspect_model(student), config.losses.shd.layer_map)
    return [
        {
            "student": pair.student.block.name,
            "teacher": pair.teacher.block.name,
            "heads": [pair.teacher.block.heads, *map(len, pair.plan)],
            "merged": [list(group) for group in members(pair.plan, pair.teacher.block.heads)],
        }
        for pair in pairs
    ]


def memory(model: ModelMixin, teacher: ModelMixin | None, measured: Figures, batch_size: int) -> Figures:
    """Bytes of one process: what stays, and what a batch of the config keeps for the backward pass.

    The latter from one image, an upper bound: what does not grow with the batch counts as often as there are images.
    """
    extra = 4 * measured["extra_parameters"]
    weights = _bytes(model, trained=False) + extra
    trained = _bytes(model, trained=True) + extra
    parts = {
        "teacher": _bytes(teacher, trained=False) if teacher else 0,
        "weights": weights,
        "gradients": trained,
        "optimiser": 2 * trained,  # AdamW's two moments
        "average": weights - extra,
        "activations": measured["bytes_kept_per_image"] * batch_size,
    }
    return parts | {"sum": sum(parts.values())}


def _bytes(model: ModelMixin, trained: bool) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not trained)


def estimate(train: TrainConfig, measured: Figures) -> Figures:
    """The whole run: images, operations, and how long this machine would take alone."""
    images_per_step = train.batch_size * train.gradient_accumulation_steps * (train.num_processes or 1)
    images = train.max_steps * images_per_step
    return {
        "steps": train.max_steps,
        "images_per_step": images_per_step,
        "images": images,
        "operations": images * measured["operations_per_image"],
        "seconds_per_step_here": images_per_step * measured["seconds_per_image"],
        "seconds_here": images * measured["seconds_per_image"],
    }


# --- tables --------------------------------------------------------------------------------------------------


def show(
    figures: Figures,
    model: ModelMixin,
    teacher: ModelMixin | None,
    config: TrainTeacherConfig | DistillConfig,
) -> None:
    """Print the models, the merge plan and the costs for a person."""
    if teacher is None or not isinstance(config, DistillConfig):
        tables = [render(model)]
    elif config.losses.shd.weight:
        tables = [render(teacher, model, config.losses.shd.layer_map)]
    else:
        tables = [render(teacher), render(model)]
    measured, run = figures["measured"], figures["run"]
    costs = Table(title="costs", title_justify="left", show_header=False)
    for name, size in figures["memory_bytes"].items():
        costs.add_row(f"memory: {name}", _gigabytes(size))
    costs.add_row(f"peak with {measured['images']} images a step", _gigabytes(measured["peak_bytes"]))
    for name, count in figures["operations_per_image"].items():
        costs.add_row(f"operations an image: {name}", f"{count:.3g}")
    costs.add_row("images a step", f"{run['images_per_step']:,}")
    costs.add_row("seconds a step, this machine alone", f"{run['seconds_per_step_here']:,.2f}")
    costs.add_row(f"all {run['steps']:,} steps, operations", f"{run['operations']:.3g}")
    costs.add_row(f"all {run['steps']:,} steps, this machine alone", f"{run['seconds_here'] / 3600:,.2f} h")
    Console(stderr=True).print(Group(*tables, costs))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.3f} GB"
