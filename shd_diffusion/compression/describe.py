"""What compressing came to: tables for a terminal, and the README.md of the folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from diffusers import ModelMixin
from rich.table import Table

from shd_diffusion.compression.budget import ShapePlan
from shd_diffusion.compression.costs import UNITS, Unit
from shd_diffusion.models.pipeline_folder import PipelineFolder

Rows: TypeAlias = list[tuple[str, ...]]

README = """# A compressed model

Made by `shd-diffusion compress {teacher}` without training, on {images} calibration images:
{before:,} parameters became {after:,}. Its prediction differs from the teacher's by {lost:.5f},
|change|² / |prediction|².

{load}

## What left

{choice}

{table}

`compression.json` has all numbers.
"""
OWN = """The class of its denoiser is `{name}`, for heads or neurons that its stock class cannot have. Install
shd-diffusion, and load it by `{pipeline}.from_pretrained` after `import shd_diffusion.models`, or train it by
`student: {{pretrained: …}}`."""
STOCK = "Its denoiser is a plain diffusers `{name}`."
BY_COUNT = """Counts were asked for. Heads were merged where the block's output moves least, neurons left by the optimal
brain surgeon's rule, and of the blocks those without which the model's output changes least. `lost` is, of heads and
neurons, |error|² / |output|² of their layer after the refit; of a block, the model's change of output without it."""
BY_BUDGET = """Found for `--budget {unit}={share:g}`: {cost_before} {measure} became {cost_after}, {left:.1%}. The
importance of a part is how the model's output changes when that part alone is smaller or leaves, |change|² / |output|²
(`lost`). Of the shapes within the budget this one has the least sum, {lost:.5f}. `saved` is a share of the cost."""


def plan_table(plan: ShapePlan) -> Table:
    """What a budget leaves, loses and saves, a line a part, for a terminal."""
    unit, whole = plan.budget.unit, plan.before
    amounts = f"{_amount(whole, unit)} → {_amount(plan.after, unit)}"
    rendered = Table(
        title=f"{amounts} {UNITS[unit]}: {plan.after / whole:.1%}",
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
    rendered.add_column("part", overflow="fold")  # names differ at their ends
    rendered.add_column("what")
    for column in ("before", "after", "lost before the refit", "lost"):
        rendered.add_column(column, justify="right")
    for part in results["parts"]:
        numbers = f"{part['lost_before']:.5f}", f"{part['lost']:.5f}"
        rendered.add_row(part["name"], part["what"], str(part["before"]), str(part["after"]), *numbers)
    return rendered


def readme(results: dict[str, Any], pipeline: PipelineFolder | None, model: ModelMixin) -> str:
    """What a compressed pipeline is, how it is loaded, what left it and why.

    Args:
        results: content of `compression.json`.
        pipeline: the teacher's, where it came in one.
        model: the compressed denoiser.
    """
    name = type(model).__name__
    by_prompt = pipeline is not None and pipeline.takes_prompts
    kind = "diffusers.DiffusionPipeline" if by_prompt else "shd_diffusion.sampling.ClassConditionalPipeline"
    load = (OWN if name.startswith("Squeezed") else STOCK).format(name=name, pipeline=kind)
    choice, columns, rows = _by_count(results) if "plan" not in results else _by_budget(results["plan"])
    return README.format(
        teacher=results["teacher"],
        images=results["images"],
        **results["parameters"],
        lost=results["lost"],
        load=load,
        choice=choice,
        table=_markdown(columns, rows) if rows else "Nothing.",
    )


def _by_count(results: dict[str, Any]) -> tuple[str, tuple[str, ...], Rows]:
    """How the shape was chosen, and the columns and rows of what it came to."""
    rows: Rows = [
        (f"`{part['name']}`", _keeps(part, part["after"]), f"{part['lost']:.5f}") for part in results["parts"]
    ]
    return BY_COUNT, ("part", "keeps", "lost"), rows


def _by_budget(plan: dict[str, Any]) -> tuple[str, tuple[str, ...], Rows]:
    """See `_by_count`."""
    whole, left, unit = plan["before"], plan["after"], plan["budget"]["unit"]
    choice = BY_BUDGET.format(
        **plan["budget"],
        cost_before=_amount(whole, unit),
        cost_after=_amount(left, unit),
        left=left / whole,
        measure=UNITS[unit],
        lost=plan["lost"],
    )
    rows: Rows = [
        (
            f"`{part['name']}`",
            _keeps(part, part["keeps"]),
            f"{part['lost']:.5f}",
            f"{part['saved'] / whole:.1%}",
        )
        for part in plan["parts"]
    ]
    return choice, ("part", "keeps", "lost", "saved"), rows


def _amount(cost: float, unit: Unit) -> str:
    return f"{cost:.4g}" if unit == "latency" else f"{cost:,.0f}"


def _keeps(part: dict[str, Any], count: int) -> str:
    return "left" if part["what"] == "block" else f"{count} of {part['before']} {part['what']}"


def _markdown(columns: Sequence[str], rows: Rows) -> str:
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
