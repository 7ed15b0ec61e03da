"""The 1,797 handwritten digits (8×8, UCI) that ship inside scikit-learn: real images without a download."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shd_diffusion.data.image_sets import ImagesInMemory

NUM_CLASSES = 10


def digits_uint8() -> tuple[Tensor, Tensor]:
    """All digits as 8-bit images (1797, 1, 8, 8) and their labels (1797,); the source has 17 grey levels."""
    from sklearn.datasets import load_digits  # slow to import

    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8))
    return images[:, None], torch.from_numpy(digits.target.astype(np.int64))


def digits() -> ImagesInMemory:
    """All digits with their labels, in the order of scikit-learn."""
    return ImagesInMemory(*digits_uint8(), NUM_CLASSES, origin="digits")
