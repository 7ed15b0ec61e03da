"""The style of all plots: on a light page, a dark page and paper.

A plot is drawn once, in the light colours. As PNG it keeps them. As SVG it stands in the page, whose style sheet puts
the colours of `DARK` in the place of those of `LIGHT` where the screen is dark (see page.html).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from shd_diffusion.progress import printable

PALETTE = {  # on a light page and on a dark one
    "ink": ("#1c2126", "#e8ebee"),
    "muted": ("#68727d", "#98a3ae"),
    "line": ("#d9dee3", "#343b43"),
    "paper": ("#ffffff", "#14171b"),
    "run-0": ("#1f63d6", "#79aaff"),
    "run-1": ("#c4560b", "#ff9f57"),
    "run-2": ("#0d8565", "#46d1a9"),
    "run-3": ("#a8328f", "#ee8bdb"),
    "run-4": ("#8a6d06", "#dcc04a"),
    "run-5": ("#5d50c9", "#aea4ff"),
    "depth-0": ("#c18a00", "#7d5bd6"),
    "depth-1": ("#d4682c", "#a65cd0"),
    "depth-2": ("#c8445c", "#cf66c2"),
    "depth-3": ("#a3307e", "#ec7c9e"),
    "depth-4": ("#71239a", "#f79a74"),
    "depth-5": ("#3c208c", "#f9c05c"),
    "depth-6": ("#15123d", "#f6ec86"),
}
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
DARK = {name: dark for name, (_, dark) in PALETTE.items()}
RUN_COLOURS = [name for name in LIGHT if name.startswith("run-")]
DEPTH_COLOURS = [name for name in LIGHT if name.startswith("depth-")]
"""From the first block to the last: the deeper, the further from the paper."""
MARKERS = "osD^vP"
WIDTH = 4.3  # inches; a panel is as wide as a phone, wider pages set panels side by side

STYLE: Any = {
    **{f"axes.spines.{side}": False for side in ("right", "top")},
    **{f"{axis}tick.{key}": value for axis in "xy" for key, value in
       {"color": LIGHT["muted"], "labelsize": 8.5, "minor.size": 0}.items()},
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 9,
    "axes.titlecolor": LIGHT["ink"],
    "axes.titlesize": 9.5,
    "figure.constrained_layout.use": True,
    "figure.facecolor": LIGHT["paper"],
    "font.size": 9,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.5,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": LIGHT["ink"],
    "svg.fonttype": "none",
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # a dollar in a run's name is a dollar
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PlotStyle:
    """How a run is drawn in every plot; `name` is its colour's name in the palettes."""

    name: str
    marker: str

    @property
    def colour(self) -> str:
        return LIGHT[self.name]


Styles = Mapping[str, PlotStyle]
"""The style of each run, by its name."""

TEACHER_STYLE = PlotStyle("muted", "*")


def plot_styles(names: Sequence[str]) -> dict[str, PlotStyle]:
    """A colour and a marker for each name; after six colours the markers differ."""
    colours, markers = len(RUN_COLOURS), len(MARKERS)
    return {
        name: PlotStyle(RUN_COLOURS[i % colours], MARKERS[(i + i // colours) % markers])
        for i, name in enumerate(names)
    }


@dataclass(frozen=True, slots=True)
class Plot:
    """A finished plot: `name` is its file stem, `description` what it shows, `svg` stands in the page."""

    name: str
    description: str
    svg: Markup
    png: bytes


@contextmanager
def panels(rows: int, columns: int, width: float, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """An empty figure of so many inches in the house style, whatever the user's matplotlibrc says, and its panels."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)


@contextmanager
def panel(height: float = 2.7) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure of one panel."""
    with panels(1, 1, WIDTH, height) as (figure, axes):
        yield figure, axes[0]


def finish(figure: Figure, name: str, description: str, inline: bool = True) -> Plot:
    """Render a figure; to be called inside the `panel` that made it. Only an `inline` one gets an SVG."""
    name = re.sub(r"[^\w.-]+", "-", name).strip("-")
    raster, vector = io.BytesIO(), io.StringIO()
    figure.draw_without_rendering()  # ticks are chosen in the first layout and need room in the second
    figure.savefig(raster, format="png", dpi=180)
    if not inline:
        return Plot(name, description, Markup(), raster.getvalue())
    figure.set_layout_engine("none")  # keeps the layout just found
    # identifiers are the plot's own, and the same in every run
    mpl.rcParams["svg.hashsalt"] = f"{name} {description}"
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(vector, format="svg", transparent=True, metadata=nothing)
    svg = vector.getvalue()
    # Groups are called `figure_1` in every plot, and nothing refers to them. Names cannot hold a `<` here.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") + len("<svg") :])
    head = Markup('<svg role="img" aria-label="{}" class="plot"').format(description)
    return Plot(name, description, head + Markup(svg), raster.getvalue())


# --- what plots are made of ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Line:
    """A curve: y over x, and a band from `low` to `high` where it has one."""

    label: str
    style: PlotStyle
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None

    def draw(self, axes: Axes, join: str = "-") -> None:
        colour, marker = self.style.colour, self.style.marker
        if self.low is not None and self.high is not None:
            axes.fill_between(self.x, self.low, self.high, color=colour, alpha=0.14, linewidth=0)
        axes.plot(self.x, self.y, marker, linestyle=join, color=colour, markersize=4.5, label=self.label)


def line_plot(
    name: str,
    description: str,
    labels: tuple[str, str],
    lines: Sequence[Line],
    ticks: Sequence[str] = (),
    join: str = "-",
    scale: Literal["zero", "fit"] = "zero",
) -> Plot:
    """One panel with a legend above.

    Args:
        labels: of the axes, x and y.
        ticks: names of x = 0, 1, ...; without them x is a number.
        join: a line style of matplotlib's, "none" for points alone.
        scale: of y, from zero, or as `fit_scale` chooses.
    """
    with panel(height=2.4 + 0.08 * len(lines)) as (figure, axes):
        for line in lines:
            line.draw(axes, join)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
        else:
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        if scale == "fit":
            fit_scale(axes, "y", np.concatenate([np.asarray(line.y, float) for line in lines]))
        else:
            axes.set_ylim(bottom=0)
        legend_above(figure, axes)
        return finish(figure, name, description)


def fit_scale(axes: Axes, axis: Literal["x", "y"], values: Sequence[float] | NDArray[np.float64]) -> None:
    """A logarithmic scale where values spread over more than a factor of five, otherwise one from 0."""
    low, high = float(np.min(values)), float(np.max(values))
    if low > 0 and high > 5 * low:
        axes.set(**{f"{axis}scale": "log", f"{axis}lim": (0.6 * low, 1.5 * high)})
        logarithmic_ticks(axes.xaxis if axis == "x" else axes.yaxis)
    elif low > 0:
        axes.set(**{f"{axis}lim": (0, 1.3 * high)})


def logarithmic_ticks(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of every power of ten, as plain numbers; what is all but constant gets some room."""
    low, high = axis.get_view_interval()
    if high < low * (1 + 1e-6):  # of which the logarithms may be the same
        axis.set_view_interval(low / 2, high * 2, ignore=True)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def legend_above(figure: Figure, axes: Axes) -> None:
    """A legend over the panel, where it hides nothing, in as many rows as the names need."""
    handles = [(handle, str(handle.get_label())) for handle in [*axes.lines, *axes.collections]]
    named = [
        (handle, label) for handle, label in handles if not re.fullmatch(r"_child\d+", label)
    ]  # given no name
    longest = max((len(label) for _, label in named), default=0)
    columns = max(1, min(len(named), int(figure.get_figwidth() * 13 / (longest + 5))))
    figure.legend(
        [handle for handle, _ in named], [label for _, label in named],
        loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.2,
    )  # fmt: skip


def drawable(text: str) -> str:
    """Text on one line with a box for each character that the plots' font has not: emoji, or signs of Chinese."""
    return "".join(c if ord(c) in _characters() else "▯" for c in printable(text))


@cache
def _characters() -> frozenset[int]:
    return frozenset(
        get_font(findfont(FontProperties(family=mpl.rcParamsDefault["font.family"]))).get_charmap()
    )


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred mean over up to `window` neighbours; at the ends and beside NaN over those that there are."""
    present = np.isfinite(values)
    kernel = np.ones(min(window, len(values)))
    total = np.convolve(np.where(present, values, 0.0), kernel, mode="same")
    count = np.convolve(present.astype(float), kernel, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)
