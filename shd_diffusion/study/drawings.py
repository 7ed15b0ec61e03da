"""The figures of a study, in the report's style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from matplotlib.axes import Axes

from shd_diffusion.reporting.drawing import (
    LIGHT,
    MARKERS,
    RUN_COLOURS,
    Drawing,
    Look,
    finish,
    legend_above,
    logarithmic_ticks,
    panel,
)
from shd_diffusion.study.results import Comparison, Outcome, Results, Row, Watched
from shd_diffusion.study.statistics import Estimate, estimate


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A colour and a marker a variant; as many pairs as six of each allow."""
    colours, markers = len(RUN_COLOURS), len(MARKERS)
    return {
        name: Look(RUN_COLOURS[i % colours], MARKERS[(i + i // colours) % markers])
        for i, name in enumerate(names)
    }


def figures_by_variant(results: Results, metric: str) -> list[Drawing]:
    """A panel a condition: every seed's figure faint, mean and interval in front, the teacher's dotted."""
    return [
        _by_variant(results, metric, condition, rows)
        for condition in results.study.conditions
        if (rows := [row for row in results.rows if row.condition == condition])
    ]


def _by_variant(results: Results, metric: str, condition: str, rows: Sequence[Row]) -> Drawing:
    look = looks(list(results.study.variants))
    with panel(height=0.9 + 0.32 * len(rows)) as (figure, axes):
        for place, row in enumerate(rows):
            colour = look[row.variant].colour
            values = [o.figures[metric] for o in results.outcomes if _same(o, row)]
            axes.plot(
                values, [place + 0.25] * len(values), "o", color=colour, alpha=0.4, markersize=3.5, mew=0
            )
            _interval(axes, row.figures[metric], place, look[row.variant])
        if metric in results.teacher:
            taught = results.teacher[metric]
            axes.axvline(taught, color=LIGHT["muted"], linestyle=":", linewidth=1)
            axes.annotate(
                "teacher", (taught, 1), xycoords=("data", "axes fraction"),
                ha="center", va="bottom", size=8, color=LIGHT["muted"],
            )  # fmt: skip
        _scale(axes, "x", [row.figures[metric].mean for row in rows])
        _names(axes, [row.variant for row in rows])
        axes.set(xlabel=_title(metric, condition))
        return finish(
            figure, f"{metric}-{condition}", f"{metric} by variant {condition}: means and 95 % intervals"
        )


def differences(results: Results, metric: str) -> list[Drawing]:
    """A panel a condition: each variant minus the reference, seed by seed, with its interval."""
    drawn = []
    for condition in results.study.conditions:
        chosen = [c for c in results.comparisons if (c.condition, c.metric) == (condition, metric)]
        if chosen:
            drawn.append(_differences(results, metric, condition, chosen))
    return drawn


def _differences(results: Results, metric: str, condition: str, chosen: Sequence[Comparison]) -> Drawing:
    look = looks(list(results.study.variants))
    with panel(height=0.9 + 0.32 * len(chosen)) as (figure, axes):
        for place, comparison in enumerate(chosen):
            _interval(axes, comparison.paired.difference, place, look[comparison.variant])
        axes.axvline(0, color=LIGHT["muted"], linewidth=0.8)
        _names(axes, [comparison.variant for comparison in chosen])
        axes.set(xlabel=f"{_title(metric, condition)} minus that of {results.study.reference}")
        return finish(
            figure, f"difference-{metric}-{condition}", f"Paired differences in {metric} {condition}"
        )


def over_conditions(results: Results, metric: str) -> Drawing | None:
    """Means and intervals from condition to condition; None where there is only one, or nothing to draw."""
    conditions = list(results.study.conditions)
    if len(conditions) < 2 or not results.rows:
        return None
    look = looks(list(results.study.variants))
    with panel(height=2.3 + 0.1 * len(look)) as (figure, axes):  # the legend grows
        for variant in results.study.variants:
            rows = [row for row in results.rows if row.variant == variant]
            if rows:
                places = [conditions.index(row.condition) for row in rows]
                _line(axes, places, [row.figures[metric] for row in rows], look[variant], variant)
        axes.set_xticks(range(len(conditions)), conditions)
        _scale(axes, "y", [row.figures[metric].mean for row in results.rows])
        axes.set(ylabel=metric.upper() if metric == "fid" else metric)
        legend_above(figure, axes)
        return finish(
            figure, f"{metric}-over-conditions", f"{metric} of each variant, condition by condition"
        )


def watched_curves(results: Results) -> list[Drawing]:
    """The watched distance over steps and over seconds, a pair of panels a condition that has it."""
    drawn = []
    for condition in results.study.conditions:
        members = [o for o in results.outcomes if o.condition == condition and o.watched]
        if members:
            drawn.append(_watched(results, condition, members, "step", lambda each: each.step))
            drawn.append(
                _watched(results, condition, members, "seconds of training", lambda each: each.seconds)
            )
    return drawn


def _watched(
    results: Results,
    condition: str,
    members: Sequence[Outcome],
    axis: str,
    cost: Callable[[Watched], float],
) -> Drawing:
    look = looks(list(results.study.variants))
    everything = [watched.fid for outcome in members for watched in outcome.watched]
    with panel(height=2.3 + 0.1 * len(look)) as (figure, axes):  # the legend grows
        for variant in dict.fromkeys(outcome.variant for outcome in members):
            by_step: dict[int, list[Watched]] = {}
            for outcome in members:
                for watched in outcome.watched if outcome.variant == variant else []:
                    by_step.setdefault(watched.step, []).append(watched)
            places = [estimate([cost(each) for each in by_step[step]]).mean for step in sorted(by_step)]
            values = [estimate([each.fid for each in by_step[step]]) for step in sorted(by_step)]
            _line(axes, places, values, look[variant], variant)
        _scale(axes, "y", everything)
        axes.set(xlabel=axis, ylabel="FID, watched" + (f", {condition}" if condition else ""))
        legend_above(figure, axes)
        return finish(figure, f"watched-over-{axis}-{condition}", f"Watched FID over {axis} {condition}")


# --- pieces --------------------------------------------------------------------------------------------------


def _same(outcome: Outcome, row: Row) -> bool:
    return (outcome.condition, outcome.variant) == (row.condition, row.variant)


def _title(metric: str, condition: str) -> str:
    return (metric.upper() if metric == "fid" else metric) + (f", {condition}" if condition else "")


def _ends(value: Estimate) -> list[float]:
    return [value.mean if end is None else end for end in (value.low, value.mean, value.high)]


def _interval(axes: Axes, value: Estimate, place: float, look: Look) -> None:
    low, _, high = _ends(value)
    axes.plot([low, high], [place, place], color=look.colour, linewidth=1.6)
    axes.plot(value.mean, place, look.marker, color=look.colour, markersize=6)


def _line(axes: Axes, places: Sequence[float], values: Sequence[Estimate], look: Look, label: str) -> None:
    low, mean, high = zip(*map(_ends, values), strict=True)
    axes.fill_between(places, low, high, color=look.colour, alpha=0.15, linewidth=0)
    axes.plot(places, mean, color=look.colour, marker=look.marker, markersize=4, label=label)


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.5, -0.5)


def _scale(axes: Axes, name: Literal["x", "y"], means: Sequence[float]) -> None:
    """A logarithmic scale where means spread over more than a factor of five, otherwise one from 0."""
    low, high = min(means), max(means)
    set_scale, set_limits, axis = (
        (axes.set_xscale, axes.set_xlim, axes.xaxis)
        if name == "x"
        else (axes.set_yscale, axes.set_ylim, axes.yaxis)
    )
    if low > 0 and high > 5 * low:
        set_scale("log")
        set_limits(0.6 * low, 1.5 * high)
        logarithmic_ticks(axis)
    elif low > 0:
        set_limits(0, 1.3 * high)
