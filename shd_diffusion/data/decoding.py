"""From an image file of any kind to an 8-bit RGB square, as ADM and DiT prepare ImageNet."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shd_diffusion.errors import UserError


class UnreadableImage(UserError):
    """An image that is corrupt, cut off, or of a kind that Pillow does not know."""


def decode(file: Path | bytes, name: str, size: int) -> Tensor:
    """An image file as 8-bit RGB (3, size, size).

    Args:
        file: its path or its content.
        name: what to call it in a message.
        size: of the centre square that is kept.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            pixels = np.array(centre_square(image.convert("RGB"), size))
    except (
        Exception
    ) as error:  # decoders raise errors of any kind on corrupt files, zlib's and struct's among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImage(f"{name}: not a readable image ({reason})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The centre of an image, its shorter side resized to `size`.

    Large images are first halved by box filters, then resized bicubically: so ADM (Dhariwal and Nichol 2021)
    and DiT prepare ImageNet, and so came about the statistics that published figures are compared with.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
