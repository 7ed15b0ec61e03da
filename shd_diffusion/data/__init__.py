"""What models are trained on: pairs of an image in [-1, 1] and a label."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import Dataset

from shd_diffusion.config import DataConfig
from shd_diffusion.data.digits import digits, digits_uint8
from shd_diffusion.data.images import to_rgb_bytes


def build_dataset(config: DataConfig) -> Dataset:
    """The data set of a config: item i is an image (C, H, W) in [-1, 1] and its label."""
    match config.name:
        case "digits":
            return digits()


def reference_images(config: DataConfig) -> Tensor:
    """The real images that samples are compared with, (N, 3, H, W), 8-bit."""
    match config.name:
        case "digits":
            images, _ = digits_uint8()
            return images.expand(-1, 3, -1, -1)


__all__ = ["build_dataset", "reference_images", "to_rgb_bytes"]
