"""Quality against what it costs: the Fréchet distance over parameters and over seconds an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from shd_diffusion.reporting.drawing import Drawing, Look, finish, panel
from shd_diffusion.reporting.runs import Run
from shd_diffusion.reporting.table import count, duration, fid_text, fid_title

LABEL_HEIGHT = 0.075  # of the panel's height


def quality_scatters(runs: Sequence[Run], looks: dict[str, Look]) -> list[Drawing]:
    """FID over parameters and over seconds an image; without a panel for which nothing is known."""
    panels = (
        _scatter(runs, looks, "parameters", lambda run: run.summary["parameters"], count),
        _scatter(runs, looks, "sampling time an image", lambda run: run.seconds_per_image, duration),
    )
    return [drawing for drawing in panels if drawing]


def _scatter(
    runs: Sequence[Run],
    looks: dict[str, Look],
    cost: str,
    cost_of: Callable[[Run], float | None],
    text: Callable[[float], str],
) -> Drawing | None:
    points = [(run, x, y) for run in runs if (x := cost_of(run)) and (y := run.figure("fid")) is not None]
    if not points:
        return None
    with panel(height=3.0) as (figure, axes):
        for run, x, y in points:
            look = looks[run.name]
            axes.plot(x, y, look.marker, color=look.colour, markersize=11 if run.is_teacher else 7)
        axes.set_xlim(0, 1.5 * max(x for _, x, _ in points))
        axes.set_ylim(0, 1.15 * max(y for *_, y in points) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: text(value))
        axes.set(xlabel=cost, ylabel=f"{fid_title(runs)}, lower is better")
        _label(axes, points, looks)
        listing = ", ".join(f"{run.name} {fid_text(y)} at {text(x)}" for run, x, y in points)
        return finish(figure, f"fid-over-{cost}", f"FID over {cost}: {listing}")


def _label(axes: Axes, points: Sequence[tuple[Run, float, float]], looks: dict[str, Look]) -> None:
    """A name right of each point; names that would overlap move up, each linked to its point."""
    top = axes.get_ylim()[1]
    taken = float("-inf")
    for run, x, y in sorted(points, key=lambda point: point[2]):
        height = max(y, taken + LABEL_HEIGHT * top)
        taken = height
        moved = height - y > 0.01 * top
        axes.annotate(
            f"{run.name}  {fid_text(y)}",
            (x, y),
            (9, (height - y) / top * 170),
            textcoords="offset points",
            va="center",
            color=looks[run.name].colour,
            arrowprops={"arrowstyle": "-", "color": looks[run.name].colour, "lw": 0.6} if moved else None,
        )
