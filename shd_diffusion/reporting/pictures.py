"""Small images: read, enlarged, set side by side, and put into the page."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shd_diffusion.errors import UserError
from shd_diffusion.reporting.plot_style import Plot, drawable, finish, panels

Pixels = NDArray[np.uint8]
"""(H, W, 3), or RGBA (H, W, 4)."""

TITLE_CHARACTERS = 12  # on an inch of a figure


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
    """An image as it is shown: its longer side at most `most` pixels, and enlarged to about `least` if smaller."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((most, most), Image.Resampling.LANCZOS)
    return enlarge(np.asarray(image), least)


def enlarge(image: Pixels, side: int) -> Pixels:
    """Repeat pixels a whole number of times until the longer side is about `side`."""
    factor = max(1, side // max(image.shape[:2]))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def mosaic(images: Sequence[Sequence[Pixels | None]], gap: int) -> Pixels:
    """Rows of images as one RGBA picture, transparent in the gaps between, and where an image is None or smaller."""
    shapes = [image.shape for row in images for image in row if image is not None]
    height, width = (max((shape[axis] for shape in shapes), default=1) for axis in (0, 1))
    rows, columns = len(images), max(map(len, images))
    picture = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            if image is not None:
                top, left = i * (height + gap), j * (width + gap)
                place = picture[top : top + image.shape[0], left : left + image.shape[1]]
                place[..., 3], place[..., : image.shape[2]] = 255, image
    return picture


def data_uri(image: Pixels) -> str:
    """An image as a PNG that stands inside the page."""
    picture, buffer = Image.fromarray(image), io.BytesIO()
    if picture.mode == "RGB" and picture.getcolors(256):
        picture = picture.quantize(256)  # exact, and a third of the size
    picture.save(buffer, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture_plot(
    name: str,
    description: str,
    pictures: Sequence[tuple[str, Pixels]],
    width: float,
    below: bool = False,
    rows: Sequence[str] = (),
) -> Plot:
    """Pictures of `width` inches under wrapped titles, side by side or one `below` the other, for documents other than
    the page.

    Args:
        rows: what stands left of the first picture, evenly down its side; long text is wrapped and cut off.
    """
    count = len(pictures)
    highest = max(picture.shape[0] / picture.shape[1] for _, picture in pictures)
    across, down = (1, count) if below else (count, 1)
    titles = ["\n".join(_wrapped(title, int(width * TITLE_CHARACTERS))) for title, _ in pictures]
    height = 0.15 + 0.15 * max(title.count("\n") + 1 for title in titles)
    size = across * width + 1.6 * bool(rows), down * (width * highest + height)
    with panels(down, across, *size) as (figure, axes):
        for ax, title, (_, picture) in zip(axes, titles, pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set_title(title, loc="left")
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set_visible(False)
        if rows:
            middles = (np.arange(len(rows)) + 0.5) * pictures[0][1].shape[0] / len(rows)
            axes[0].set_yticks(middles, ["\n".join(_wrapped(text, 22)) for text in rows])
            axes[0].tick_params(length=0)
        return finish(figure, name, description, inline=False)


def is_plot(file: Path) -> bool:
    """Whether Matplotlib has drawn a picture, as all plots here."""
    try:
        with Image.open(file) as image:
            return str(image.info.get("Software", "")).startswith("Matplotlib")
    except Exception:  # what is no image, and whatever Pillow says to it
        return False


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(drawable(text), width, max_lines=5, placeholder=" …")
