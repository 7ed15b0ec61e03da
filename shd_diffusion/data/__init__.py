"""What models are trained on, by config: images from files or a hub, or latents of them that `prepare` cached."""

from __future__ import annotations

from shd_diffusion.config import DataConfig
from shd_diffusion.data.digits import digits
from shd_diffusion.data.images import to_rgb_bytes
from shd_diffusion.data.labelled import LabelledImages
from shd_diffusion.data.source import ImageSource, Source, check_source


def build_source(config: DataConfig) -> Source:
    """What to train on.

    Raises:
        UserError: the files are missing, damaged, or not what the data set is made of.
    """
    return ImageSource(open_images(config), config.horizontal_flip, config.num_workers)


def open_images(config: DataConfig) -> LabelledImages:
    """The images of a data set, with their labels; errors as for `build_source`."""
    match config.name:
        case "digits":
            return digits()
    raise AssertionError(config.name)


build_dataset = build_source

__all__ = ["ImageSource", "LabelledImages", "Source", "build_source", "check_source", "open_images", "to_rgb_bytes"]
