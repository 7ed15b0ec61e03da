"""Samples side by side: the same noise and the same label in every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from shd_diffusion.errors import UserError
from shd_diffusion.reporting.drawing import Drawing, data_uri, enlarge, finish, mosaic, panels
from shd_diffusion.reporting.runs import Run, Samples

MAX_ROWS, PER_ROW = 10, 4
MAX_SIDE = 128
"""Pixels: larger samples are shown reduced."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """A picture a run: rows are class labels, `PER_ROW` samples each.

    Attributes:
        labels: the rows' class labels.
        pictures: run and picture, RGBA.
        same_noise: whether image j of every run began from the same noise with the same label.
    """

    labels: list[int]
    pictures: list[tuple[Run, NDArray[np.uint8]]]
    same_noise: bool

    def uris(self) -> list[tuple[Run, str]]:
        return [(run, data_uri(picture)) for run, picture in self.pictures]


def sample_gallery(runs: Sequence[Run]) -> Gallery | None:
    """Samples of the same indices from every run that has samples; None where none has.

    Raises:
        UserError: an image that sampling.json promises cannot be read.
    """
    sampled = [(run, run.samples) for run in runs if run.samples and run.samples.labels]
    if not sampled:
        return None
    common = min(len(samples.labels) for _, samples in sampled)
    first = sampled[0][1].labels[:common]
    present = sorted(set(first))
    chosen = [present[i] for i in np.unique(np.linspace(0, len(present) - 1, MAX_ROWS).round().astype(int))]
    indices = [[j for j, label in enumerate(first) if label == row][:PER_ROW] for row in chosen]
    return Gallery(
        labels=chosen,
        pictures=[(run, _picture(samples, indices)) for run, samples in sampled],
        same_noise=all(
            samples.labels[:common] == first
            and samples.protocol.get("seed") == sampled[0][1].protocol.get("seed")
            for _, samples in sampled
        ),
    )


def draw_gallery(gallery: Gallery) -> Drawing:
    """The gallery as one figure, for documents that are not the page."""
    count = len(gallery.pictures)
    height, width = gallery.pictures[0][1].shape[:2]
    with panels(1, count, 1.9 * count, 1.9 * height / width + 0.3) as (figure, axes):
        for ax, (run, picture) in zip(axes, gallery.pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set_title(run.name)
            ax.axis("off")
        names = ", ".join(run.name for run, _ in gallery.pictures)
        return finish(figure, "samples", f"Samples side by side: {names}", inline=False)


def _picture(samples: Samples, indices: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    rows = [[_sample(samples, j) for j in row] for row in indices]
    return mosaic(rows, gap=max(2, rows[0][0].shape[0] // 16))


def _sample(samples: Samples, index: int) -> NDArray[np.uint8]:
    path = samples.folder / f"{index:06d}.png"
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError):
        raise UserError(
            f"{path}: cannot be read; run `shd-diffusion sample {samples.folder.parent}` again"
        ) from None
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return enlarge(np.asarray(image), side=48)
