"""Small images: read, enlarged, set side by side, and put into the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shd_diffusion.errors import UserError
from shd_diffusion.reporting.plot_style import Plot, finish, panels

Pixels = NDArray[np.uint8]
"""(H, W, 3), or RGBA (H, W, 4)."""


def read_picture(path: Path, command: str) -> Pixels:
    """Read an image as RGB.

    Raises:
        UserError: it cannot be read; `command` makes it again.
    """
    try:
        with Image.open(path) as file:
            return np.asarray(file.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"{path}: cannot be read; run `{command}` again") from None


def thumbnail(pixels: Pixels, most: int, least: int = 48) -> Pixels:
    """An image as it is shown: its longer side at most `most` pixels, and enlarged to about `least` if it is smaller."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((most, most), Image.Resampling.LANCZOS)
    return enlarge(np.asarray(image), least)


def enlarge(image: Pixels, side: int) -> Pixels:
    """Repeat pixels a whole number of times until the longer side is about `side`."""
    factor = max(1, side // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def mosaic(images: Sequence[Sequence[Pixels | None]], gap: int) -> Pixels:
    """Rows of equal images (H, W, 3) as one RGBA picture, transparent in the gaps between and where one is None."""
    height, width = next(image.shape[:2] for row in images for image in row if image is not None)
    rows, columns = len(images), max(map(len, images))
    picture = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            if image is None:
                continue
            top, left = i * (height + gap), j * (width + gap)
            picture[top : top + height, left : left + width, :3] = image
            picture[top : top + height, left : left + width, 3] = 255
    return picture


def data_uri(image: Pixels) -> str:
    """An image as a PNG that stands inside the page."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if picture.mode == "RGB" and picture.getcolors(256):
        picture = picture.quantize(256)  # exact, and a third of the size
    picture.save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_plot(
    name: str, description: str, pictures: Sequence[tuple[str, Pixels]], width: float, below: bool = False
) -> Plot:
    """Titled pictures of `width` inches, side by side or one `below` the other, for documents that are not the page."""
    count, (height, breadth) = len(pictures), pictures[0][1].shape[:2]
    rows, columns = (count, 1) if below else (1, count)
    size = columns * width, rows * (width * height / breadth + 0.3)
    with panels(rows, columns, *size) as (figure, axes):
        for ax, (title, picture) in zip(axes, pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set_title(title, loc="left")
            ax.axis("off")
        return finish(figure, name, description, inline=False)
