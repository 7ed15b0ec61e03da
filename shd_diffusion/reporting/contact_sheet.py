"""`show`: what the models will see, as one picture: a row a class, after framing; of a cache, decoded latents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shd_diffusion.data import DataConfig, LatentSource, build_source, open_dataset
from shd_diffusion.data.datasets import name_of
from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.image_sets import Images
from shd_diffusion.data.images import to_rgb, to_rgb_bytes
from shd_diffusion.data.latent_space import LatentSpace
from shd_diffusion.data.tell import announce_images
from shd_diffusion.errors import UserError
from shd_diffusion.files import replacing_file
from shd_diffusion.models.denoiser import pad
from shd_diffusion.reporting.pictures import Pixels, is_plot, mosaic, picture_plot, thumbnail

ROWS, COLUMNS = 12, 8
SIDE = 128  # pixels, the longer side of a picture
LOOKED_AT = 2000  # items of a cache whose classes are looked at

Show = Callable[[int], Tensor]
"""From an index to a picture, uint8 (3, H, W)."""


def write_sheet(config: DataConfig, output: Path) -> None:
    """Write the contact sheet of a data set or a cache.

    At most `ROWS` classes are shown, evenly picked, and `COLUMNS` images of each; without classes as many rows of all
    images. One that cannot be read leaves a gap.

    Raises:
        UserError: the data cannot be had, or have no images, or another picture would be replaced.
    """
    if output.exists() and not is_plot(output):
        raise UserError(
            f"--output {output}: would be replaced, but is no plot of shd-diffusion; give another"
        )
    if config.name == "latents":
        count, labels, names, show = _of_cache(config)
    else:
        count, labels, names, show = _of_images(config)
    rows, titles = [], []
    for title, indices in _choose(count, labels, names):
        found = [_picture(show, index) for index in indices]
        rows.append(found + [None] * (COLUMNS - len(found)))
        titles.append(title)
    picture = mosaic(rows, gap=4)
    plot = picture_plot(
        "sheet", name_of(config), [(name_of(config), picture)], width=7.0, rows=titles if any(titles) else ()
    )
    with replacing_file(output) as temporary:
        temporary.write_bytes(plot.png)


def _of_images(config: DataConfig) -> tuple[int, Tensor | None, list[str] | None, Show]:
    images: Images = open_dataset(config)
    announce_images(images, name_of(config))
    return len(images), images.labels, images.class_names, lambda index: to_rgb(images.image(index))


def _of_cache(config: DataConfig) -> tuple[int, Tensor | None, list[str] | None, Show]:
    """Of the first item of each so many, where there are very many."""
    source = build_source(config)
    assert isinstance(source, LatentSource)
    space = LatentSpace(source.load_vae())
    step = -(-len(source) // LOOKED_AT)
    labels = None
    if source.num_classes is not None:
        labels = torch.stack([source.item(i, 0)["class_labels"] for i in range(0, len(source), step)])

    def show(place: int) -> Tensor:
        items = pad([source.item(place * step, 0)])
        size = source.shape_of(items)
        latents = source.clean(items, torch.zeros(1, dtype=torch.bool), torch.zeros(1, *size))
        return to_rgb_bytes(space.decode(latents))[0]

    return len(range(0, len(source), step)), labels, source.class_names, show


def _choose(count: int, labels: Tensor | None, names: list[str] | None) -> list[tuple[str, list[int]]]:
    """The title and the images of each row."""
    if labels is None:
        chosen = _evenly(count, ROWS * COLUMNS)
        return [("", chosen[start : start + COLUMNS]) for start in range(0, len(chosen), COLUMNS)]
    present = labels.unique().tolist()
    rows = []
    for place in _evenly(len(present), ROWS):
        label = present[place]
        members = (labels == label).nonzero()[:, 0].tolist()
        title = f"{label}" if names is None else f"{label} {names[label]}"
        rows.append((title, [members[each] for each in _evenly(len(members), COLUMNS)]))
    return rows


def _evenly(count: int, most: int) -> list[int]:
    """At most so many of `count` places, evenly spread."""
    shown = min(count, most)
    return [place * count // shown for place in range(shown)]


def _picture(show: Show, index: int) -> Pixels | None:
    try:
        image = show(index)
    except UnreadableImage:
        return None
    return thumbnail(image.permute(1, 2, 0).contiguous().numpy(), SIDE, SIDE)
