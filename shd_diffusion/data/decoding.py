"""From an image file of any kind to 8-bit RGB, and to a square or a bucket as ADM and DiT prepare ImageNet."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from shd_diffusion.data.framing import Framing, Geometry, Size, bucket_of, crop_of, resizings
from shd_diffusion.errors import UserError, one_line

SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class UnreadableImage(UserError):
    """An image that is corrupt, cut off, too large, or of a kind that Pillow does not know."""


class UnreadFile(UnreadableImage):
    """An image whose file could not be read; it may be another time."""


class SmallImage(UnreadableImage):
    """An image that is smaller than `data.least_size`."""


def decode(file: Path | bytes, name: str, framing: Framing | None = None) -> Tensor:
    """An image file as 8-bit RGB (3, H, W).

    Args:
        file: its path or its content.
        name: what to call it in a message.
        framing: which part of it is kept, see `cover`; None keeps all of it, upright and on white.

    Raises:
        UnreadableImage: it cannot be decoded, or is too small.
    """
    with _opened(file, name) as image:
        _check_size(image, name, framing)
        turned = (framing is None or framing.upright) and _orientation(image) != 1
        straight = ImageOps.exif_transpose(image) if turned else image
        if framing is None:
            return pil_to_tensor(to_rgb(straight))
        rgb = to_rgb(straight, framing.background)
        return pil_to_tensor(cover(rgb, bucket_of(*rgb.size, framing.buckets)))


def read_geometry(file: Path | bytes, name: str, framing: Framing) -> Geometry:
    """What `decode` does to an image, from the file's header alone.

    Raises:
        UnreadableImage: the header cannot be read; what follows it is not looked at.
    """
    with _opened(file, name) as image:
        _check_size(image, name, framing)
        width, height = image.size
        orientation = _orientation(image) if framing.upright else 1
        if orientation in SIDEWAYS:
            width, height = height, width
        return replace(framing.geometry(width, height), turned=orientation != 1)


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """An image of any kind as 8-bit RGB: levels scaled by their depth, transparent pixels on a background.

    Raises:
        ValueError: its levels have no known scale.
    """
    if image.mode.startswith("I;16"):
        return _from_levels(np.asarray(image) / 65535)
    if image.mode == "F":
        return _from_levels(np.asarray(image))
    if image.mode == "I":
        raise ValueError("levels of 32 bits, of which none is known to be white; save it with 8 or 16")
    if not image.has_transparency_data:
        return image.convert("RGB")
    behind = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")


def _from_levels(levels: np.ndarray) -> Image.Image:
    """Grey levels (H, W), 0 is black and 1 white."""
    if not (levels.min() >= 0 and levels.max() <= 1):  # nor NaN
        raise ValueError("levels outside of 0 (black) to 1 (white); scale them, or save it with 8 or 16 bits")
    return Image.fromarray((levels * 255).round().astype(np.uint8)).convert("RGB")


def cover(
    image: Image.Image,
    size: Size,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
    halve: bool = True,
) -> Image.Image:
    """The centre of an image, which is resized to cover `size` (H, W) just about.

    Large images are first halved by box filters, then resized bicubically: so ADM (Dhariwal and Nichol 2021)
    and DiT prepare ImageNet, and so came about the statistics that published metrics are compared with.

    Args:
        resample: another filter.
        halve: False resizes large images by the filter alone.
    """
    halvings, resized = resizings(*image.size, size, halve)
    for half in halvings:
        image = image.resize(half, Image.Resampling.BOX)
    top, left = crop_of(resized, size)
    return image.resize(resized, resample).crop((left, top, left + size[1], top + size[0]))


def centre_square(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC, halve: bool = True
) -> Image.Image:
    """The centre of an image, its shorter side resized to `size`; see `cover`."""
    return cover(image, (size, size), resample, halve)


@contextmanager
def _opened(file: Path | bytes, name: str) -> Iterator[Image.Image]:
    """An image whose header has been read; whatever goes wrong with it, then or later, is told of the image."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            yield image
    except UnreadableImage:
        raise
    # decoders raise errors of any kind on corrupt files, zlib's and struct's among them
    except Exception as error:
        of_system = isinstance(error, OSError) and error.errno is not None  # Pillow's own have no number
        kind = UnreadFile if of_system else UnreadableImage
        raise kind(f"{name}: not a readable image ({one_line(error)})") from None


def _check_size(image: Image.Image, name: str, framing: Framing | None) -> None:
    if framing is not None and min(image.size) < framing.least_size:
        width, height = image.size
        raise SmallImage(
            f"{name}: is {width}×{height}, below the {framing.least_size} pixels of `data.least_size`"
        )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation in an image's header; 1 where there is none."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    try:
        # that of the base class: PNG's own would decode the pixels to look behind them
        return int(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged tag takes nothing away from the pixels
        return 1
