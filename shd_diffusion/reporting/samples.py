"""Samples side by side: the same noise and the same label in every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shd_diffusion.reporting.pictures import Pixels, data_uri, mosaic, picture_plot, read_picture, thumbnail
from shd_diffusion.reporting.plot_style import Plot
from shd_diffusion.reporting.runs import Run

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
    pictures: list[tuple[Run, Pixels]]
    same_noise: bool

    def uris(self) -> list[tuple[Run, str]]:
        return [(run, data_uri(picture)) for run, picture in self.pictures]

    def plot(self) -> Plot:
        """The gallery as one figure."""
        named = [(run.name, picture) for run, picture in self.pictures]
        names = ", ".join(name for name, _ in named)
        return picture_plot("samples", f"Samples side by side: {names}", named, width=1.9)


def sample_gallery(runs: Sequence[Run]) -> Gallery | None:
    """Samples of the same indices from every run that has samples; None where none has.

    Raises:
        UserError: an image that sampling.json promises cannot be read.
    """
    sampled = [
        (run, run.samples.labels, run.samples.protocol) for run in runs if run.samples and run.samples.labels
    ]
    if not sampled:
        return None
    common = min(len(labels) for _, labels, _ in sampled)
    first = sampled[0][1][:common]
    present = sorted(set(first))
    chosen = [present[i] for i in np.unique(np.linspace(0, len(present) - 1, MAX_ROWS).round().astype(int))]
    indices = [[j for j, label in enumerate(first) if label == row][:PER_ROW] for row in chosen]
    return Gallery(
        labels=chosen,
        pictures=[(run, _picture(run, indices)) for run, *_ in sampled],
        same_noise=all(
            labels[:common] == first and protocol.get("seed") == sampled[0][2].get("seed")
            for _, labels, protocol in sampled
        ),
    )


def _picture(run: Run, indices: Sequence[Sequence[int]]) -> Pixels:
    def sample(index: int) -> Pixels:
        path = run.path / "samples" / f"{index:06d}.png"
        return thumbnail(read_picture(path, f"shd-diffusion sample {run.path}"), MAX_SIDE)

    rows = [[sample(index) for index in row] for row in indices]
    return mosaic(rows, gap=max(2, rows[0][0].shape[0] // 16))
