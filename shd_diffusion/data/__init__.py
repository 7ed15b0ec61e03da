"""What models are trained on, by config: images, or latents of them that `prepare` has cached."""

from __future__ import annotations

from pathlib import Path

from shd_diffusion.config import DataConfig
from shd_diffusion.data.digits import digits
from shd_diffusion.data.folder import ImageFolder
from shd_diffusion.data.hub import HubImages
from shd_diffusion.data.images import to_rgb_bytes
from shd_diffusion.data.labelled import LabelledImages
from shd_diffusion.data.latents import LatentSource, read_manifest
from shd_diffusion.data.published import cifar10, fashion_mnist
from shd_diffusion.data.reference import ReferenceImages
from shd_diffusion.data.source import ImageSource, Source, check_source


def build_source(config: DataConfig) -> Source:
    """What to train on.

    Raises:
        UserError: the files are missing, damaged, or not what the data set is made of.
    """
    if config.name == "latents":
        return LatentSource(
            Path(config.path or ""), config.horizontal_flip, config.num_workers, config.verify
        )
    return ImageSource(open_images(config), config.horizontal_flip, config.num_workers)


def open_images(config: DataConfig) -> LabelledImages:
    """The images of a data set with their labels; of latents, the images that they were made from.

    Raises:
        UserError: as `build_source`.
    """
    path, size, split = Path(config.path or ""), config.image_size or 0, config.split or "train"
    match config.name:
        case "digits":
            return digits()
        case "fashion_mnist":
            return fashion_mnist(path if config.path else None, split)
        case "cifar10":
            return cifar10(path, split)
        case "image_folder":
            return ImageFolder(path, size)
        case "huggingface":
            return HubImages(config.path or "", split, size, config.image_column, config.label_column)
        case "latents":
            return open_images(DataConfig.model_validate(read_manifest(path)["data"]))


def reference_images(config: DataConfig) -> ReferenceImages:
    """The real images that samples are compared with; of latents, those that could be encoded.

    Raises:
        UserError: as `build_source`.
    """
    if config.name == "latents":
        manifest = read_manifest(Path(config.path or ""))
        made_from = DataConfig.model_validate(manifest["data"])
        left_out = [image["index"] for shard in manifest["shards"] for image in shard["unreadable"]]
        return ReferenceImages(open_images(made_from), _describe(made_from), left_out)
    return ReferenceImages(open_images(config), _describe(config))


def _describe(config: DataConfig) -> str:
    """The data set in a few words, as a report names it."""
    parts = (config.name, config.path, config.split, config.image_size and f"{config.image_size} px")
    return " ".join(str(part) for part in parts if part)


__all__ = [
    "ImageSource",
    "LabelledImages",
    "LatentSource",
    "ReferenceImages",
    "Source",
    "build_source",
    "check_source",
    "open_images",
    "reference_images",
    "to_rgb_bytes",
]
