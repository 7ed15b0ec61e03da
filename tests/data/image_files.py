"""Small images of many shapes, one of which may be broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 16
NUM_IMAGES = 14
BROKEN = 5  # in the order of the paths


def write_images(folder: Path, broken: bool) -> Path:
    """14 smooth images of many shapes, ten `cat`s and four `dog`s; one PNG may be cut in half."""
    rng = np.random.default_rng(0)
    for index in range(NUM_IMAGES):
        path = folder / ("cat" if index < 10 else "dog") / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((20 + 7 * index, 70 - 3 * index), Image.Resampling.BICUBIC).save(path)
        if broken and index == BROKEN:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
    return folder
