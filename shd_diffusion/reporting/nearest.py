"""Samples beside the real images that they resemble most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shd_diffusion.reporting.drawing import Drawing, data_uri, enlarge, finish, mosaic, panels
from shd_diffusion.reporting.runs import Nearest, Run

MAX_SIDE = 96
"""Pixels: larger images are shown reduced."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as the page shows it: what it is called in full, and what stands below it."""

    uri: str
    name: str
    caption: str
    detail: str


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """The samples of a run, each with its neighbours; `middle` is the median of the nearest ones' distances."""

    run: Run
    rows: list[list[Picture]]
    middle: float | None


def neighbourhoods(runs: Sequence[Run]) -> list[Neighbourhood]:
    """Of the runs whose evaluation has looked for neighbours."""
    return [_neighbourhood(run, run.nearest) for run in runs if run.nearest and run.nearest.rows]


def _neighbourhood(run: Run, nearest: Nearest) -> Neighbourhood:
    rows = []
    for row, images in zip(nearest.rows, _cells(nearest), strict=True):
        texts = [(f"sample {row.index}", f"#{row.index}", "" if row.label is None else f"label {row.label}")]
        for name, relative in zip(row.names, row.relative, strict=True):
            texts.append((name, short_name(name), "–" if relative is None else f"{relative:.2f}"))
        rows.append([Picture(data_uri(image), *text) for image, text in zip(images, texts, strict=True)])
    known = [row.relative[0] for row in nearest.rows if row.relative[0] is not None]
    return Neighbourhood(run, rows, median(known) if known else None)


def short_name(name: str) -> str:
    """Of an image, what tells it from the others: `#5` for `digits: image 5`, otherwise the file's name."""
    _, numbered, number = name.rpartition(": image ")
    return f"#{number}" if numbered else Path(name).name


def draw_neighbours(runs: Sequence[Run]) -> Drawing | None:
    """All of them as one figure, for documents that are not the page; None where there is none."""
    known = [(run, run.nearest) for run in runs if run.nearest and run.nearest.rows]
    if not known:
        return None
    pictures = [mosaic(_cells(nearest), gap=4) for _, nearest in known]
    height, width = pictures[0].shape[:2]
    with panels(1, len(known), 2.1 * len(known), 2.1 * height / width + 0.3) as (figure, axes):
        for ax, (run, _), picture in zip(axes, known, pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set_title(run.name)
            ax.axis("off")
        names = ", ".join(run.name for run, _ in known)
        return finish(
            figure, "nearest", f"Samples and the real images nearest to them: {names}", inline=False
        )


def _cells(nearest: Nearest) -> list[list[NDArray[np.uint8]]]:
    """The picture cut up: a row a sample, the sample first, as large as they are shown."""
    columns = 1 + len(nearest.rows[0].names)
    height, width = nearest.picture.shape[0] // len(nearest.rows), nearest.picture.shape[1] // columns
    cells = nearest.picture.reshape(len(nearest.rows), height, columns, width, 3).swapaxes(1, 2)
    return [[_shown(cell) for cell in row] for row in cells]


def _shown(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return enlarge(np.asarray(image), side=48)
