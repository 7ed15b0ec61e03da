"""Figures that suit a light page, a dark page and paper: drawn once, coloured by the page.

A figure is drawn in the light colours. Saved as PNG it keeps them; as inline SVG every colour of the palette
becomes a CSS variable of the same name, and text takes the page's font.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

LIGHT = {
    "ink": "#1c2126",
    "muted": "#68727d",
    "line": "#d9dee3",
    "paper": "#ffffff",
    "run-0": "#1f63d6",
    "run-1": "#c4560b",
    "run-2": "#0d8565",
    "run-3": "#a8328f",
    "run-4": "#8a6d06",
    "run-5": "#5d50c9",
    "depth-0": "#c18a00",
    "depth-1": "#d4682c",
    "depth-2": "#c8445c",
    "depth-3": "#a3307e",
    "depth-4": "#71239a",
    "depth-5": "#3c208c",
    "depth-6": "#15123d",
}
DARK = {
    "ink": "#e8ebee",
    "muted": "#98a3ae",
    "line": "#343b43",
    "paper": "#14171b",
    "run-0": "#79aaff",
    "run-1": "#ff9f57",
    "run-2": "#46d1a9",
    "run-3": "#ee8bdb",
    "run-4": "#dcc04a",
    "run-5": "#aea4ff",
    "depth-0": "#7d5bd6",
    "depth-1": "#a65cd0",
    "depth-2": "#cf66c2",
    "depth-3": "#ec7c9e",
    "depth-4": "#f79a74",
    "depth-5": "#f9c05c",
    "depth-6": "#f6ec86",
}
RUN_COLOURS = [name for name in LIGHT if name.startswith("run-")]
DEPTH_COLOURS = [name for name in LIGHT if name.startswith("depth-")]
"""From the first block to the last: the deeper, the further from the paper."""
MARKERS = "osD^vP"
WIDTH = 4.3  # inches; a panel is as wide as a phone, wider pages set panels side by side

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": LIGHT["line"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
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
    "xtick.color": LIGHT["muted"],
    "xtick.labelsize": 8.5,
    "xtick.minor.size": 0,
    "ytick.color": LIGHT["muted"],
    "ytick.labelsize": 8.5,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True, slots=True)
class Look:
    """How a run is drawn in every figure; `variable` is its colour's name in the page's style."""

    variable: str
    marker: str

    @property
    def colour(self) -> str:
        return LIGHT[self.variable]


TEACHER_LOOK = Look("muted", "*")


def student_look(number: int) -> Look:
    """The look of the student of this number, from 0; after six they repeat."""
    return Look(RUN_COLOURS[number % len(RUN_COLOURS)], MARKERS[number % len(MARKERS)])


@dataclass(frozen=True, slots=True)
class Drawing:
    """A finished figure: `name` is its file stem, `description` what it shows, `svg` stands in the page."""

    name: str
    description: str
    svg: Markup
    png: bytes

    def save(self, folder: Path) -> None:
        (folder / f"{self.name}.png").write_bytes(self.png)


@contextmanager
def panels(rows: int, columns: int, width: float, height: float) -> Iterator[tuple[Figure, list[Axes]]]:
    """An empty figure, in inches, in the house style, and its panels row by row."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure, list(figure.subplots(rows, columns, squeeze=False).flat)


@contextmanager
def panel(width: float = WIDTH, height: float = 2.7) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure of one panel."""
    with panels(1, 1, width, height) as (figure, axes):
        yield figure, axes[0]


def finish(figure: Figure, name: str, description: str, inline: bool = True) -> Drawing:
    """Render a figure; to be called inside the `panel` that made it.

    Args:
        inline: whether the page will show it; a figure of pixels is only saved.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-")
    raster, vector = io.BytesIO(), io.StringIO()
    figure.draw_without_rendering()  # ticks are chosen in the first layout and need room in the second
    figure.savefig(raster, format="png", dpi=180)
    if inline:
        figure.set_layout_engine("none")  # keeps the layout just found
        with mpl.rc_context({"svg.hashsalt": name}):  # the same input gives the same file
            figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = _themed(vector.getvalue(), name, description) if inline else Markup()
    return Drawing(name, description, svg, raster.getvalue())


def _themed(svg: str, name: str, description: str) -> Markup:
    """Inline SVG whose colours follow the page and whose identifiers are its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]+;?|(font: [\d.]+px) [^;\"]+", r"\1", svg)
    for colour, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{colour})")
    head = Markup('<svg role="img" aria-label="{}" class="plot"').format(description)
    return head + Markup(svg.removeprefix("<svg"))


def logarithmic_ticks(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 of every power of ten, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def legend_above(figure: Figure, axes: Axes) -> None:
    """A legend over the panel, where it hides nothing, in as many rows as the names need."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 13 / (longest + 5))))
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, handlelength=1.4, columnspacing=1.2
    )


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred mean over up to `window` neighbours; at the ends and beside NaN over those that there are."""
    present = np.isfinite(values)
    kernel = np.ones(min(window, len(values)))
    total = np.convolve(np.where(present, values, 0.0), kernel, mode="same")
    count = np.convolve(present.astype(float), kernel, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0.5)


# --- small images -------------------------------------------------------------------------------------------


def enlarge(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Repeat pixels a whole number of times until the longer side is about `side`."""
    factor = max(1, side // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def mosaic(images: Sequence[Sequence[NDArray[np.uint8]]], gap: int) -> NDArray[np.uint8]:
    """Rows of equal images (H, W, 3) as one RGBA picture, transparent in the gaps between."""
    height, width = images[0][0].shape[:2]
    rows, columns = len(images), max(map(len, images))
    picture = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            top, left = i * (height + gap), j * (width + gap)
            picture[top : top + height, left : left + width, :3] = image
            picture[top : top + height, left : left + width, 3] = 255
    return picture


def data_uri(image: NDArray[np.uint8]) -> str:
    """An image as a PNG that stands inside the page."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if picture.mode == "RGB" and picture.getcolors(256):
        picture = picture.quantize(256)  # exact, and a third of the size
    picture.save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
