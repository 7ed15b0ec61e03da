"""From an image file of any kind to 8-bit RGB, and to a square as ADM and DiT prepare ImageNet."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from shd_diffusion.errors import UserError, one_line


class UnreadableImage(UserError):
    """An image that is corrupt, cut off, too large, or of a kind that Pillow does not know."""


def decode(file: Path | bytes, name: str, size: int | None = None) -> Tensor:
    """An image file as 8-bit RGB (3, H, W).

    Args:
        file: its path or its content.
        name: what to call it in a message.
        size: of the centre square that is kept, see `centre_square`; None keeps the image as it is.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            rgb = image.convert("RGB")
            return pil_to_tensor(rgb if size is None else centre_square(rgb, size))
    # decoders raise errors of any kind on corrupt files, zlib's and struct's among them
    except Exception as error:
        raise UnreadableImage(f"{name}: not a readable image ({one_line(error)})") from None


def centre_square(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC, halve: bool = True
) -> Image.Image:
    """The centre of an image, its shorter side resized to `size`.

    Large images are first halved by box filters, then resized bicubically: so ADM (Dhariwal and Nichol 2021)
    and DiT prepare ImageNet, and so came about the statistics that published metrics are compared with.

    Args:
        resample: another filter.
        halve: False resizes large images by the filter alone.
    """
    while halve and min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
