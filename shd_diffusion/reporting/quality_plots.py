"""Quality against what it costs, and which classes are hard: a metric over sizes and times, FID over classes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from shd_diffusion.evaluation.metric import Column
from shd_diffusion.reporting.cost import PARAMETERS, SAMPLING_TIME, Cost, measured_costs
from shd_diffusion.reporting.metrics_table import distance_of, headline, text_of, title_of
from shd_diffusion.reporting.plot_style import Line, Plot, Styles, finish, line_plot, panel
from shd_diffusion.reporting.runs import Run

LABEL_HEIGHT = 0.075  # of the panel's height


def quality_scatters(runs: Sequence[Run], styles: Styles) -> list[Plot]:
    """FID, or the first metric that there is, over parameters and what `benchmark` has measured, or the seconds an
    image that sampling took; without a panel for which nothing is known."""
    metric = headline(runs)
    if metric is None:
        return []
    costs = [PARAMETERS, *(measured_costs(runs) or [SAMPLING_TIME])]
    return [plot for cost in costs for plot in _scatter(runs, styles, metric, cost)]


def _scatter(
    runs: Sequence[Run],
    styles: Styles,
    metric: Column,
    cost: Cost,
) -> list[Plot]:
    title, name, text = title_of(metric, runs), cost.title.lower(), cost.text
    points = [
        (run, x, y) for run in runs if (x := cost.of(run)) and (y := run.metric(metric.key)) is not None
    ]
    if not points:
        return []
    with panel(height=3.0) as (figure, axes):
        for run, x, y in points:
            style = styles[run.name]
            axes.plot(x, y, style.marker, color=style.colour, markersize=11 if run.is_teacher else 7)
        axes.set_xlim(0, 1.5 * max(x for _, x, _ in points))
        axes.set_ylim(0, 1.15 * max(y for *_, y in points) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_formatter(lambda value, _: text(value))
        axes.set(xlabel=name, ylabel=f"{title}, {metric.better} is better")
        _name_points(axes, metric, points, styles)
        listing = ", ".join(f"{run.name} {text_of(metric, y)} at {text(x)}" for run, x, y in points)
        return [finish(figure, f"{metric.key}-over-{name}", f"{title} over {name}: {listing}")]


def _name_points(
    axes: Axes, metric: Column, points: Sequence[tuple[Run, float, float]], styles: Styles
) -> None:
    """A name right of each point; names that would overlap move up, each linked to its point."""
    top = axes.get_ylim()[1]
    taken = float("-inf")
    for run, x, y in sorted(points, key=lambda point: point[2]):
        height = max(y, taken + LABEL_HEIGHT * top)
        taken, colour = height, styles[run.name].colour
        moved = height - y > 0.01 * top
        axes.annotate(
            f"{run.name}  {text_of(metric, y)}", (x, y), (9, (height - y) / top * 170),
            textcoords="offset points", va="center", color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6} if moved else None,
        )  # fmt: skip


def per_class_fid(runs: Sequence[Run], styles: Styles) -> list[Plot]:
    """Fréchet distance by class; nothing where no evaluation has it."""
    known = [(run, run.metrics.per_class_fid) for run in runs if run.metrics and run.metrics.per_class_fid]
    if not known:
        return []
    labels = list(dict.fromkeys(label for _, values in known for label in values))
    lines = [
        Line(run.name, styles[run.name], [labels.index(label) for label in values], list(values.values()))
        for run, values in known
    ]
    named = [known[0][0].class_name(int(label)) for label in labels]
    title, ticks = distance_of([run for run, _ in known]), named if len(labels) <= 20 else []
    names = ("class", f"{title} of the class")
    return [line_plot("fid-per-class", f"{title} by class", names, lines, ticks, join="none")]
