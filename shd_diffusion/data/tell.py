"""What a stage has read, in one line: how many images, which classes, what was done to them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from shd_diffusion.data.decoding import SmallImage, UnreadableImage
from shd_diffusion.data.image_sets import ImageFiles, Images
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce

MOST_NAMES = 10
LOOKED_AT = 1000  # headers: of more images so many, evenly spread


def announce_images(images: Images, name: str) -> None:
    """Tell, once a launch, what is in a data set.

    Args:
        name: of the data set.
    """
    if processes().is_main_process:
        announce(f"{name}: {describe_images(images)}")


def describe_images(images: Images) -> str:
    """How many images, which classes or captions, and from the headers of image files how many are enlarged, turned,
    too small or unreadable; of what follows a header nothing is known yet."""
    classes = describe_classes(images.num_classes, images.class_names)
    parts = [f"{len(images):,} images{classes}{_describe_captions(images)}"]
    if isinstance(images, ImageFiles):
        counts = _look(images)
        seen = min(len(images), LOOKED_AT)
        told = [f"{count} {what}" for what, count in counts.items() if count]
        if told:
            parts.append(", ".join(told) + (f" of {seen:,} looked at" if seen < len(images) else ""))
        if counts["enlarged"]:
            parts.append("`data.least_size` leaves small ones out")
    return "; ".join(parts)


def describe_classes(count: int | None, names: Sequence[str] | None) -> str:
    """`, 3 classes: cat, dog, ship`; nothing without classes."""
    if count is None:
        return ""
    told = f", {count:,} class{'es' if count > 1 else ''}"
    if not names:
        return told
    more = f" and {count - MOST_NAMES:,} more" if count > MOST_NAMES else ""
    return f"{told}: {', '.join(names[:MOST_NAMES])}{more}"


def _describe_captions(images: Images) -> str:
    """One of them, by which it is seen whether they are the right ones."""
    captions = images.captions(0)
    return f", captions such as {textwrap.shorten(captions[0], 80, placeholder=' ...')!r}" if captions else ""


def _look(images: ImageFiles) -> dict[str, int]:
    """What the headers of at most `LOOKED_AT` images tell."""
    counts = {"enlarged": 0, "turned": 0, "too small": 0, "unreadable": 0}
    step = -(-len(images) // min(len(images), LOOKED_AT))
    for index in range(0, len(images), step):
        try:
            geometry = images.geometry(index)
        except UnreadableImage as error:
            counts["too small" if isinstance(error, SmallImage) else "unreadable"] += 1
            continue
        counts["enlarged"] += any(a < b for a, b in zip(geometry.original_size, geometry.size, strict=True))
        counts["turned"] += geometry.turned
    return counts
