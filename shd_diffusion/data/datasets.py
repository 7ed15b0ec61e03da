"""The data sets by name, and the section `data` of a config that chooses one.

A new data set is a file with a function that opens it, and an entry of `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from shd_diffusion.data.digits import digits
from shd_diffusion.data.folder import ImageFolder
from shd_diffusion.data.hub import HubImages
from shd_diffusion.data.image_sets import Images, ReferenceImages
from shd_diffusion.data.latents import LatentSource, caption_number, read_manifest, source_index
from shd_diffusion.data.published import cifar10, fashion_mnist
from shd_diffusion.data.source import ImageSource, Source
from shd_diffusion.errors import UserError, did_you_mean
from shd_diffusion.section import Section


class DataConfig(Section):
    """What the models are trained on; `DATASETS` says which keys a data set needs, and which it takes.

    `caption_column` switches captions on, and tells where they are: of `huggingface` a column of strings or lists of
    strings; of `image_folder` a key of `metadata.jsonl`, or `txt` for a .txt beside each image, one caption a line.
    With captions sub-folders are no classes, and a `label_column` is read where it is given.
    """

    name: str = "digits"
    path: str | None = None
    image_size: int | None = Field(None, ge=1)
    split: str | None = None
    image_column: str = "image"
    label_column: str | None = "label"
    caption_column: str | None = None
    horizontal_flip: bool = False
    verify: bool = True
    num_workers: int = Field(0, ge=0)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(f"no data set `{name}`; {did_you_mean(name, DATASETS)}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _captions_stand_for_labels(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and keys.get("caption_column") is not None:
            data_set = DATASETS.get(keys.get("name", ""))
            if data_set and "label_column" in data_set.takes:
                return {"label_column": None, **keys}
        return keys

    @model_validator(mode="after")
    def _keys_belong_to_the_data_set(self) -> DataConfig:
        data_set = DATASETS[self.name]
        for key in data_set.needs:
            if getattr(self, key) is None:
                raise ValueError(f"`{self.name}` needs the key `{key}`; add it")
        known = {"name", "num_workers", *data_set.needs, *data_set.takes}
        for key, field in type(self).model_fields.items():
            if key not in known and getattr(self, key) != field.default:
                raise ValueError(f"`{self.name}` takes no key `{key}`; remove it")
        return self


@dataclass(frozen=True)
class DataSet:
    """How a data set is opened, the keys of `DataConfig` that it needs, and those that it also takes."""

    open: Callable[[DataConfig], Images]
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


DATASETS: dict[str, DataSet] = {
    "digits": DataSet(lambda config: digits()),
    "fashion_mnist": DataSet(
        lambda config: fashion_mnist(Path(config.path) if config.path else None, config.split or "train"),
        takes=("path", "split", "horizontal_flip"),
    ),
    "cifar10": DataSet(
        lambda config: cifar10(Path(config.path or ""), config.split or "train"),
        needs=("path",),
        takes=("split", "horizontal_flip"),
    ),
    "image_folder": DataSet(
        lambda config: ImageFolder(Path(config.path or ""), config.image_size or 0, config.caption_column),
        needs=("path", "image_size"),
        takes=("caption_column", "horizontal_flip"),
    ),
    "huggingface": DataSet(
        lambda config: HubImages(
            config.path or "",
            config.split or "train",
            config.image_size or 0,
            config.image_column,
            config.label_column,
            config.caption_column,
        ),
        needs=("path", "image_size"),
        takes=("split", "image_column", "label_column", "caption_column", "horizontal_flip"),
    ),
    "latents": DataSet(
        lambda config: open_dataset(_made_from(config)), needs=("path",), takes=("horizontal_flip", "verify")
    ),
}


def open_dataset(config: DataConfig) -> Images:
    """The images of a data set with their conditions; of latents, the images that they were made from.

    Raises:
        UserError: the files are missing, damaged, or not what the data set is made of.
    """
    return DATASETS[config.name].open(config)


def build_source(config: DataConfig) -> Source:
    """What to train on.

    Raises:
        UserError: as `open_dataset`.
    """
    if config.name == "latents":
        folder = Path(config.path or "")
        return LatentSource(folder, config.horizontal_flip, config.num_workers, config.verify)
    return ImageSource(open_dataset(config), config.horizontal_flip, config.num_workers)


def reference_images(config: DataConfig) -> ReferenceImages:
    """The real images that samples are compared with; of latents, those that could be encoded.

    Raises:
        UserError: as `open_dataset`.
    """
    left_out = []
    if config.name == "latents":
        shards = read_manifest(Path(config.path or ""))["shards"]
        left_out = [image["index"] for shard in shards for image in shard["unreadable"]]
        config = _made_from(config)
    parts = (config.name, config.path, config.split, config.image_size and f"{config.image_size} px")
    return ReferenceImages(open_dataset(config), " ".join(str(part) for part in parts if part), left_out)


def caption_of(source: LatentSource, index: int, epoch: int) -> str:
    """The caption that item `index` of a cache has in an epoch, from the data that the cache was made from.

    Raises:
        UserError: they cannot be had any more, are others by now, or have no captions.
    """
    manifest = source.dataset.manifest
    images = open_dataset(DataConfig.model_validate(manifest["data"]))
    if images.fingerprint() != manifest["identity"]["source"]:
        raise UserError("data: are others than the cache was made from; run `shd-diffusion prepare` again")
    captions = images.captions(source_index(manifest, index))
    if not captions:
        raise UserError("data: have no captions")
    return captions[caption_number(index, epoch, len(captions))]


def _made_from(config: DataConfig) -> DataConfig:
    """The images that latents were made from."""
    return DataConfig.model_validate(read_manifest(Path(config.path or ""))["data"])
