"""What models are trained on, by config: images, or latents of them that `prepare` has cached."""

from shd_diffusion.data.datasets import DATASETS, DataConfig, build_source, open_dataset, reference_images
from shd_diffusion.data.image_sets import Images, ReferenceImages
from shd_diffusion.data.latents import LatentSource
from shd_diffusion.data.source import ImageSource, Source

__all__ = [
    "DATASETS",
    "DataConfig",
    "ImageSource",
    "Images",
    "LatentSource",
    "ReferenceImages",
    "Source",
    "build_source",
    "open_dataset",
    "reference_images",
]
