"""Which part of an image is kept, and at what size: its centre, as a square or in the bucket nearest to its shape.

Everything here follows from widths and heights alone; decoding.py does it to pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Size = tuple[int, int]  # height, width

LEAST_AREA = 0.9  # of a bucket, as a share of the square's
LARGEST_RATIO = 4  # of its longer side to its shorter one


@dataclass(frozen=True)
class Geometry:
    """Where a training image comes from, in pixels; what SDXL and PixArt are told of it.

    Attributes:
        original_size: (H, W) of the image before anything was done to it, upright.
        crop: (top, left) of what is kept, in the image as it was resized.
        size: (H, W) of what is kept.
        turned: its file says by EXIF how it is upright, and it was turned so.
    """

    original_size: Size
    crop: tuple[int, int]
    size: Size
    turned: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class Framing:
    """How images of a data set are cut.

    Attributes:
        image_size: side of a square that has about the pixels of each bucket.
        buckets: sizes that images are brought to, each to the one nearest to its shape.
        upright: images are turned as their EXIF orientation says; otherwise they are taken as they are stored.
        background: behind transparent pixels, a colour of Pillow's.
        least_size: images whose shorter side has fewer pixels are refused.
    """

    image_size: int
    buckets: Sequence[Size]
    upright: bool = True
    background: str = "white"
    least_size: int = 0

    def geometry(self, width: int, height: int) -> Geometry:
        """What becomes of an image of this size."""
        size = bucket_of(width, height, self.buckets)
        _, resized = resizings(width, height, size)
        return Geometry((height, width), crop_of(resized, size), size)


def square(size: int) -> Framing:
    """The framing of a centre square of `size`×`size` pixels."""
    return Framing(size, [(size, size)])


def buckets_of(size: int, step: int) -> list[Size]:
    """All sizes with sides that are multiples of `step` and about `size`² pixels, the tallest first.

    They have 90 to 100 % of the square's pixels and are at most four times as long as wide. With steps of 64 at 1024
    these are the buckets of SDXL (Podell et al. 2023, appendix I), and with 32 at 512 and 128 at 2048 those of
    PixArt-Σ; `size` is a multiple of `step`.
    """
    sides = range(step, LARGEST_RATIO * size, step)
    return [
        (height, width)
        for height in reversed(sides)
        for width in sides
        if LEAST_AREA * size**2 <= height * width <= size**2
        and max(height, width) <= LARGEST_RATIO * min(height, width)
    ]


def bucket_of(width: int, height: int, buckets: Iterable[Size]) -> Size:
    """The bucket (H, W) whose ratio of sides is nearest to an image's by its logarithm; the largest of equal ones."""

    def distance(bucket: Size) -> tuple[float, int]:
        tall, wide = height * bucket[1], width * bucket[0]
        return math.log(max(tall, wide) / min(tall, wide)), -bucket[0] * bucket[1]

    return min(buckets, key=distance)


def resizings(
    width: int, height: int, size: Size, halve: bool = True
) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Through which sizes (W, H) an image goes until it covers `size` (H, W).

    Args:
        halve: large images are halved first.

    Returns:
        the sizes after each halving, and the last one.
    """
    halvings = []
    while halve and height >= 2 * size[0] and width >= 2 * size[1]:
        width, height = width // 2, height // 2
        halvings.append((width, height))
    scale = max(size[0] / height, size[1] / width)
    return halvings, (max(size[1], round(width * scale)), max(size[0], round(height * scale)))


def crop_of(resized: tuple[int, int], size: Size) -> tuple[int, int]:
    """(top, left) of the centre of `size` (H, W) in an image of `resized` (W, H)."""
    return (resized[1] - size[0]) // 2, (resized[0] - size[1]) // 2
