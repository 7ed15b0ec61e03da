"""Samples side by side: the same noise and the same label or prompt in every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shd_diffusion.reporting.pictures import Pixels, data_uri, mosaic, picture_plot, read_picture, thumbnail
from shd_diffusion.reporting.plot_style import Plot
from shd_diffusion.reporting.runs import Run, Samples
from shd_diffusion.sample_folder import image_path

Kind = Literal["labels", "prompts", "neither"]
"""What images are made from."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the images of a kind are shown: so many rows at most, so many images of a run in each, and in pixels the
    longer side of the largest and the smallest, and in inches the width of a run's in the figure."""

    rows: int
    images: int
    most: int
    least: int
    width: float


LAYOUTS: dict[Kind, Layout] = {
    "labels": Layout(rows=10, images=4, most=128, least=48, width=1.9),
    "prompts": Layout(rows=8, images=1, most=192, least=192, width=1.3),
    "neither": Layout(rows=6, images=4, most=128, least=48, width=1.9),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A label or prompt, and for each run its images, RGBA, side by side; None where it has none."""

    title: str
    pictures: list[Pixels | None]

    def uris(self) -> list[str | None]:
        return [None if picture is None else data_uri(picture) for picture in self.pictures]


@dataclass(frozen=True, slots=True)
class Gallery:
    """The images of runs of one kind.

    Attributes:
        same_noise: whether image j of every run began from the same noise with the same label or prompt.
        left_out: so many labels or prompts are not shown.
    """

    kind: Kind
    runs: list[Run]
    rows: list[Row]
    same_noise: bool
    left_out: int

    def plot(self) -> Plot:
        """The gallery as one figure."""
        columns = zip(*(row.pictures for row in self.rows), strict=True)
        named = [
            (run.name, mosaic([[picture] for picture in column], gap=6))
            for run, column in zip(self.runs, columns, strict=True)
        ]
        name = "samples" if self.kind == "labels" else f"samples-{self.kind}"
        width = LAYOUTS[self.kind].width
        titles = [row.title for row in self.rows]
        description = f"Samples side by side: {', '.join(run.name for run in self.runs)}"
        return picture_plot(name, description, named, width, rows=titles if any(titles) else ())


def sample_galleries(runs: Sequence[Run]) -> list[Gallery]:
    """Samples of the same label or prompt from every run that has samples: a gallery for each kind of them.

    Raises:
        UserError: an image cannot be read.
    """
    sampled: dict[Kind, list[tuple[Run, Samples]]] = {}
    for run in runs:
        if run.samples and run.samples.num_images:
            sampled.setdefault(_kind(run.samples), []).append((run, run.samples))
    return [_gallery(kind, members) for kind, members in sampled.items()]


def _kind(samples: Samples) -> Kind:
    if samples.prompts is not None:
        return "prompts"
    return "labels" if samples.labels is not None else "neither"


def _gallery(kind: Kind, members: Sequence[tuple[Run, Samples]]) -> Gallery:
    layout = LAYOUTS[kind]
    titles = [_titles(kind, samples, layout.images) for _, samples in members]
    places = [_places(each) for each in titles]
    present = _shared(places)
    if kind == "labels":
        present = sorted(present, key=int)
    chosen = [present[i] for i in _evenly(len(present), layout.rows)]
    if kind == "neither":
        chosen = present[: layout.rows]
    common = min(len(each) for each in titles)
    seeds = [samples.protocol.get("seed") for _, samples in members]
    named = next((run for run, _ in members if run.class_names), members[0][0]).class_name
    shown = {title: named(int(title)) if kind == "labels" else title for title in chosen}
    return Gallery(
        kind,
        [run for run, _ in members],
        [
            Row(
                shown[title] if kind != "neither" else "",
                [
                    _strip(run, own.get(title, [])[: layout.images], layout)
                    for (run, _), own in zip(members, places, strict=True)
                ],
            )
            for title in chosen
        ],
        all(each[:common] == titles[0][:common] for each in titles) and len(set(map(str, seeds))) == 1,
        len(present) - len(chosen),
    )


def _titles(kind: Kind, samples: Samples, images: int) -> list[str]:
    """What row each image belongs to; those made from nothing are dealt out in their order."""
    if kind == "neither":
        return [str(index // images) for index in range(samples.num_images)]
    return [str(title) for title in (samples.prompts if kind == "prompts" else samples.labels) or []]


def _places(titles: Sequence[str]) -> dict[str, list[int]]:
    """The indices of the images of each row, in the order in which they begin."""
    places: dict[str, list[int]] = {}
    for index, title in enumerate(titles):
        places.setdefault(title, []).append(index)
    return places


def _shared(places: Sequence[Mapping[str, list[int]]]) -> list[str]:
    """The rows that all runs have images for; where there are none, those of the first run."""
    return [title for title in places[0] if all(title in own for own in places)] or list(places[0])


def _evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly picked."""
    return list(dict.fromkeys(np.linspace(0, count - 1, most).round().astype(int).tolist())) if count else []


def _strip(run: Run, indices: Sequence[int], layout: Layout) -> Pixels | None:
    """Images of a run side by side, with gaps for those that are missing; None where all are."""
    found = [_sample(run, index, layout) for index in indices]
    found += [None] * (layout.images - len(found))
    shape = next((image.shape for image in found if image is not None), None)
    if shape is None:
        return None
    return mosaic([found], gap=max(2, shape[0] // 16))


def _sample(run: Run, index: int, layout: Layout) -> Pixels | None:
    path = image_path(run.path / "samples", index)
    if not path.exists():
        return None
    return thumbnail(read_picture(path, f"shd-diffusion sample {run.path}"), layout.most, layout.least)
