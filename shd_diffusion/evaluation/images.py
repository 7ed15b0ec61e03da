"""Images from a folder of PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from shd_diffusion.errors import UserError


def read_images(folder: Path) -> Tensor:
    """All PNG files of a folder in the order of their names: uint8 (N, 3, H, W); grey becomes RGB.

    Raises:
        UserError: no such folder, no image in it, a broken one, or sizes that differ.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise UserError(
            f"{folder}: no PNG files here; run `shd-diffusion sample` first or give another folder"
        )
    return torch.stack([_read(path) for path in paths])


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, UnidentifiedImageError, SyntaxError):
        raise UserError(f"{path}: not a readable PNG file; delete it and sample again") from None
