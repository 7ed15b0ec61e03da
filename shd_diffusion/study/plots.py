"""The plots of a study, in the report's style."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from shd_diffusion.evaluation.metrics import higher_is_better
from shd_diffusion.reporting.plot_style import (
    LIGHT,
    Line,
    Plot,
    PlotStyle,
    finish,
    fit_scale,
    line_plot,
    panel,
    plot_styles,
)
from shd_diffusion.reporting.tables import count
from shd_diffusion.statistics import Estimate, estimate
from shd_diffusion.study.results import Outcome, Results, Row, ValidationPoint

CURVES = 8  # that can be told apart in one panel


def study_plots(results: Results) -> list[Plot]:
    """The first metric over conditions, or of many variants what each came to and cost; then in each condition, its
    differences, and the validation's curves."""
    metric, conditions = results.study.metrics[0], results.study.conditions
    first = over_conditions if len(results.study.variants) <= CURVES else standings
    return [
        *first(results, metric),
        *(plot for condition in conditions for plot in by_variant(results, metric, condition)),
        *(plot for condition in conditions for plot in differences(results, metric, condition)),
        *(plot for condition in conditions for plot in validation_curves(results, condition)),
    ]


def over_conditions(results: Results, metric: str) -> list[Plot]:
    """Means and intervals from condition to condition; nothing where there is only one."""
    conditions, styles = list(results.study.conditions), plot_styles(list(results.study.variants))
    if len(conditions) < 2 or not results.rows:
        return []
    lines = []
    for variant, style in styles.items():
        if rows := [row for row in results.rows if row.variant == variant]:
            places = [conditions.index(row.condition) for row in rows]
            lines.append(_line(variant, style, places, [row.metrics[metric] for row in rows]))
    description = f"{results.heading(metric)} of each variant, condition by condition"
    names = ("condition", results.heading(metric))
    return [line_plot(f"{metric}-over-conditions", description, names, lines, conditions, scale="fit")]


def standings(results: Results, metric: str) -> list[Plot]:
    """All variants under all conditions in one panel, the best of the first condition on top; at the right the seconds
    of training over the reference's, and the parameters that stay behind."""
    if not results.rows:
        return []
    conditions = plot_styles(list(results.study.conditions))
    first = [row.variant for row in _best_first(results, metric, next(iter(conditions)))]
    order = list(dict.fromkeys([*first, *(row.variant for row in results.rows)]))
    reference = {r.condition: r for r in results.rows if r.variant == results.study.reference}
    costs = {r.variant: _cost(r, reference.get(r.condition)) for r in results.rows}  # of the last condition
    with panel(height=0.9 + 0.24 * len(order)) as (figure, axes):
        for row in results.rows:
            _interval(axes, order.index(row.variant), row.metrics[metric], conditions[row.condition])
        _teacher_line(axes, results, metric)
        _fit_scale(axes, results, metric, results.rows)
        axes.set_yticks(range(len(order)), order)
        axes.set_ylim(len(order) - 0.5, -0.5)
        axes.set(xlabel=results.heading(metric))
        right = axes.twinx()
        right.set_ylim(axes.get_ylim())
        right.set_yticks(range(len(order)), [costs[variant] for variant in order])
        right.grid(False)
        right.tick_params(length=0)
        right.spines[:].set_visible(False)
        if len(conditions) > 1:
            handles = [
                axes.plot([], [], style.marker, color=style.colour)[0] for style in conditions.values()
            ]
            figure.legend(handles, list(conditions), loc="outside upper left", ncols=len(conditions))
        description = (
            f"{results.heading(metric)} of each variant: means and 95 % intervals, and what each cost"
        )
        return [finish(figure, f"{metric}-standings", description)]


def by_variant(results: Results, metric: str, condition: str) -> list[Plot]:
    """Every seed's metric faint, mean and interval in front, the teacher's dotted."""
    rows = [row for row in results.rows if row.condition == condition]
    if not rows:
        return []
    styles = plot_styles(list(results.study.variants))
    with panel(height=0.9 + 0.32 * len(rows)) as (figure, axes):
        for place, row in enumerate(rows):
            colour = styles[row.variant].colour
            seeds = [o for o in results.outcomes if (o.condition, o.variant) == (condition, row.variant)]
            values = [outcome.metrics[metric] for outcome in seeds]
            axes.plot(
                values, [place + 0.25] * len(values), "o", color=colour, alpha=0.4, markersize=3.5, mew=0
            )
        _teacher_line(axes, results, metric)
        _intervals(axes, {row.variant: row.metrics[metric] for row in rows}, styles)
        _fit_scale(axes, results, metric, rows)
        axes.set(xlabel=_title(results.heading(metric), condition))
        description = f"{results.heading(metric)} by variant {condition}: means and 95 % intervals"
        return [finish(figure, f"{metric}-{condition}", description)]


def differences(results: Results, metric: str, condition: str) -> list[Plot]:
    """Each variant minus the reference, seed by seed, with its interval."""
    chosen = [c for c in results.comparisons if (c.condition, c.metric) == (condition, metric)]
    if not chosen:
        return []
    with panel(height=0.9 + 0.32 * len(chosen)) as (figure, axes):
        found = {comparison.variant: comparison.paired.difference for comparison in chosen}
        _intervals(axes, found, plot_styles(list(results.study.variants)))
        axes.axvline(0, color=LIGHT["muted"], linewidth=0.8)
        axes.set(
            xlabel=f"{_title(results.heading(metric), condition)} minus that of {results.study.reference}"
        )
        description = f"Paired differences in {results.heading(metric)} {condition}"
        return [finish(figure, f"difference-{metric}-{condition}", description)]


def validation_curves(results: Results, condition: str) -> list[Plot]:
    """The validation's Fréchet distance over steps and over seconds, of many variants those of the reference and of the
    best; nothing where no run has it."""
    best = [row.variant for row in _best_first(results, results.study.metrics[0], condition)]
    chosen = {results.study.reference, *best[: CURVES - 1]}
    members = [
        o for o in results.outcomes if o.condition == condition and o.validation and o.variant in chosen
    ]
    if not members:
        return []
    return [
        _curve(results, members, "step", lambda point: point.step),
        _curve(results, members, "seconds of training", lambda point: point.seconds),
    ]


def _curve(
    results: Results, members: Sequence[Outcome], axis: str, cost: Callable[[ValidationPoint], float]
) -> Plot:
    lines, condition = [], members[0].condition
    for variant, style in plot_styles(list(results.study.variants)).items():
        by_step: dict[int, list[ValidationPoint]] = {}
        for point in (point for o in members if o.variant == variant for point in o.validation):
            by_step.setdefault(point.step, []).append(point)
        if points := [by_step[step] for step in sorted(by_step)]:
            places = [estimate([cost(point) for point in at_step]).mean for at_step in points]
            values = [estimate([point.fid for point in at_step]) for at_step in points]
            lines.append(_line(variant, style, places, values))
    return line_plot(
        f"validation-over-{axis}-{condition}",
        f"{results.heading('fid')} of the validation over {axis} {condition}",
        (axis, _title(f"{results.heading('fid')}, validation", condition)),
        lines,
        scale="fit",
    )


# --- pieces --------------------------------------------------------------------------------------------------


def _best_first(results: Results, metric: str, condition: str) -> list[Row]:
    """The rows of a condition, by their means."""
    rows = [row for row in results.rows if row.condition == condition]
    return sorted(rows, key=lambda row: row.metrics[metric].mean, reverse=higher_is_better(metric))


def _cost(row: Row, reference: Row | None) -> str:
    """Seconds of training over the reference's, and parameters that stay behind."""
    parts = []
    if reference is not None and reference.training_seconds.mean:  # a run of 0 steps takes none
        parts.append(f"×{row.training_seconds.mean / reference.training_seconds.mean:.2f}")
    if row.extra_parameters:
        parts.append(f"{count(row.extra_parameters)} extra")
    return ", ".join(parts)


def _title(what: str, condition: str) -> str:
    return f"{what}, {condition}" if condition else what


def _ends(value: Estimate) -> tuple[float, float]:
    """The interval, which of a single value is that value."""
    return (value.mean if value.low is None else value.low), (
        value.mean if value.high is None else value.high
    )


def _intervals(axes: Axes, values: dict[str, Estimate], styles: dict[str, PlotStyle]) -> None:
    """A named row for each value, from the top."""
    for place, (name, value) in enumerate(values.items()):
        _interval(axes, place, value, styles[name])
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.5, -0.5)


def _interval(axes: Axes, place: int, value: Estimate, style: PlotStyle) -> None:
    """A mean and its interval, in the row at `place`."""
    axes.plot(_ends(value), [place, place], color=style.colour, linewidth=1.6)
    axes.plot(value.mean, place, style.marker, color=style.colour, markersize=6)


def _teacher_line(axes: Axes, results: Results, metric: str) -> None:
    """The teacher's metric, dotted, where it was evaluated."""
    if metric in results.teacher:
        value = results.teacher[metric]
        axes.axvline(value, color=LIGHT["muted"], linestyle=":", linewidth=1)
        axes.annotate(
            "teacher", (value, 1), xycoords=("data", "axes fraction"),
            ha="center", va="bottom", size=8, color=LIGHT["muted"],
        )  # fmt: skip


def _fit_scale(axes: Axes, results: Results, metric: str, rows: Sequence[Row]) -> None:
    """The scale on which all means are seen, and the teacher's metric."""
    means = [row.metrics[metric].mean for row in rows]
    fit_scale(axes, "x", [*means, results.teacher[metric]] if metric in results.teacher else means)


def _line(label: str, style: PlotStyle, places: Sequence[float], values: Sequence[Estimate]) -> Line:
    low, high = zip(*map(_ends, values), strict=True)
    return Line(label, style, places, [value.mean for value in values], low, high)
