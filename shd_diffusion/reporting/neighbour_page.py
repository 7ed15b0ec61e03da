"""Samples beside the real images that they resemble most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from shd_diffusion.errors import UserError
from shd_diffusion.reporting.pictures import Pixels, data_uri, mosaic, picture_plot, read_picture, thumbnail
from shd_diffusion.reporting.plot_style import Plot
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
    """The samples of a run, each with its neighbours.

    Attributes:
        pixels: a row a sample: the sample itself, then its neighbours, the nearest first.
        rows: the same with their names.
        middle: the median of the nearest ones' distances, in units of that from there to the next real image.
    """

    run: Run
    pixels: list[list[Pixels]]
    rows: list[list[Picture]]
    middle: float | None


def neighbourhoods(runs: Sequence[Run]) -> list[Neighbourhood]:
    """Of the runs whose evaluation has looked for neighbours.

    Raises:
        UserError: a picture of them is damaged.
    """
    return [_neighbourhood(run, run.nearest) for run in runs if run.nearest and run.nearest.samples]


def _neighbourhood(run: Run, nearest: Nearest) -> Neighbourhood:
    pixels = _cells(run, nearest)
    rows, known = [], []
    for sample, images in zip(nearest.samples, pixels, strict=True):
        label = "" if sample.label is None else run.label_text(sample.label)
        texts = [(f"sample {sample.index}", f"#{sample.index}", label)]
        for each in sample.nearest:
            relative = f"{each.distance / sample.spacing:.2f}" if sample.spacing else "–"
            texts.append((each.name, short_name(each.name), relative))
        if sample.spacing:
            known.append(sample.nearest[0].distance / sample.spacing)
        rows.append([Picture(data_uri(image), *text) for image, text in zip(images, texts, strict=True)])
    return Neighbourhood(run, pixels, rows, median(known) if known else None)


def short_name(name: str) -> str:
    """Of an image, what tells it from the others: `#5` for `digits: image 5`, otherwise the file's name."""
    _, numbered, number = name.rpartition(": image ")
    return f"#{number}" if numbered else Path(name).name


def neighbour_plots(neighbourhoods: Sequence[Neighbourhood]) -> list[Plot]:
    """All of them as one figure."""
    pictures = [(each.run.name, mosaic(each.pixels, gap=4)) for each in neighbourhoods]
    names = ", ".join(name for name, _ in pictures)
    description = f"Samples and the real images nearest to them: {names}"
    return [picture_plot("nearest", description, pictures, width=2.1)] if pictures else []


def _cells(run: Run, nearest: Nearest) -> list[list[Pixels]]:
    """The evaluation's picture cut up: a row a sample, the sample first, as large as they are shown."""
    path, command = run.path / "evaluation" / "nearest.png", f"shd-diffusion evaluate {run.path}"
    picture = read_picture(path, command)
    rows, columns = len(nearest.samples), 1 + len(nearest.samples[0].nearest)
    uneven = any(1 + len(sample.nearest) != columns for sample in nearest.samples)
    if uneven or picture.shape[0] % rows or picture.shape[1] % columns:
        raise UserError(f"{path}: has other rows or columns than nearest.json; run `{command}` again")
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    cells = picture.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    return [[thumbnail(cell, MAX_SIDE) for cell in row] for row in cells]
