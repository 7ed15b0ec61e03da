"""The data sets by name, and the section `data` of a config that chooses one.

A new data set is a file with a function that opens it, and an entry of `DATASETS`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ImageColor
from pydantic import Field, field_validator, model_validator

from shd_diffusion.data.cache_shards import by_size
from shd_diffusion.data.digits import digits
from shd_diffusion.data.emoji import Emoji
from shd_diffusion.data.folder import ImageFolder
from shd_diffusion.data.framing import Framing, buckets_of
from shd_diffusion.data.hub import HubImages
from shd_diffusion.data.image_sets import Images, ReferenceImages
from shd_diffusion.data.latents import LatentSource, caption_number, read_manifest
from shd_diffusion.data.prompts import Prompts, no_images
from shd_diffusion.data.published import cifar10, fashion_mnist
from shd_diffusion.data.sampled_images import SampledImages
from shd_diffusion.data.source import ImageSource, Source
from shd_diffusion.data.tar_images import ShardedImages
from shd_diffusion.data.tell import announce_images, describe_classes
from shd_diffusion.data.unreadable import find_unreadable
from shd_diffusion.errors import UserError, did_you_mean
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce
from shd_diffusion.section import Section

OF_IMAGE_FILES = ("upright", "background", "least_size")
"""Keys of data sets whose images are decoded from files."""


class DataConfig(Section):
    """What the models are trained on; `DATASETS` says which keys a data set needs, and which it takes.

    `caption_column` switches captions on, and tells where they are:

    - `huggingface`: a column of strings or lists of strings;
    - `image_folder`: a key of `metadata.jsonl`, or `txt` for a .txt beside each image, one caption a line;
    - `webdataset`, whose `path` names shards by braces and wildcards: an extension such as `txt`, or `json.KEY`;
    - `prompts`, which have no images yet: a column; without it `path` is a text file, one prompt a line.

    `samples` are the images that `sample` has written to `path`, such as a teacher's, with their labels.

    With captions sub-folders are no classes, and a `label_column` is read only where it is given.

    Image files are turned `upright` as their EXIF orientation says (ADM and DiT did not do so: false gives images equal
    to theirs); transparent pixels show the `background`, a name or `#rrggbb`; an image whose shorter side is below
    `least_size` is refused in training, and left out by `prepare`. One that cannot be read is left out by both, up to a
    share; in training the next one stands in for it.

    `buckets` keeps the shape of images about: a number of pixels, of which the sides of the buckets are multiples (64
    at 1024 px gives those of SDXL), or a list of them, each [height, width]. Each image is cut to the nearest one.
    Without it images become squares.
    """

    name: str = "digits"
    path: str | None = None
    image_size: int | None = Field(None, ge=1, le=2**14)
    split: str | None = None
    image_column: str = "image"
    label_column: str | None = "label"
    caption_column: str | None = None
    buckets: int | list[list[int]] | None = None
    upright: bool = True
    background: str = "white"
    least_size: int = Field(0, ge=0)
    horizontal_flip: bool = False
    verify: bool = True
    num_workers: int = Field(0, ge=0, le=1024)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(f"no data set `{name}`; {did_you_mean(name, DATASETS)}")
        return name

    @field_validator("background")
    @classmethod
    def _is_a_colour(cls, background: str) -> str:
        try:
            opaque = len(ImageColor.getrgb(background)) == 3
        except ValueError:
            opaque = False
        if not opaque:
            raise ValueError(f"{background}: give a colour, such as white or '#808080'")
        return background

    @field_validator("buckets")
    @classmethod
    def _are_sizes(cls, buckets: int | list[list[int]] | None) -> int | list[list[int]] | None:
        sizes = [[buckets] * 2] if isinstance(buckets, int) else buckets
        if sizes is not None and not (sizes and all(len(size) == 2 and min(size) > 0 for size in sizes)):
            raise ValueError(f"{buckets}: give the step of their sides, or a list of [height, width]")
        return buckets

    @model_validator(mode="before")
    @classmethod
    def _captions_stand_for_labels(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and keys.get("caption_column") is not None:
            data_set = DATASETS.get(str(keys.get("name")))
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
        if isinstance(self.buckets, int) and (self.image_size or 0) % self.buckets:
            raise ValueError(
                f"`image_size` is {self.image_size}, which is no multiple of `buckets`, {self.buckets}; change either"
            )
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
    "emoji": DataSet(
        lambda config: Emoji(
            config.image_size or 0, config.split or "train", Path(config.path) if config.path else None
        ),
        needs=("image_size",),
        takes=("path", "split"),
    ),
    "image_folder": DataSet(
        lambda config: ImageFolder(Path(config.path or ""), framing_of(config), config.caption_column),
        needs=("path", "image_size"),
        takes=("caption_column", "buckets", "horizontal_flip", *OF_IMAGE_FILES),
    ),
    "huggingface": DataSet(
        lambda config: HubImages(
            config.path or "",
            config.split or "train",
            framing_of(config),
            config.image_column,
            config.label_column,
            config.caption_column,
        ),
        needs=("path", "image_size"),
        takes=(
            "split",
            "image_column",
            "label_column",
            "caption_column",
            "buckets",
            "horizontal_flip",
            *OF_IMAGE_FILES,
        ),
    ),
    "webdataset": DataSet(
        lambda config: ShardedImages(config.path or "", framing_of(config), config.caption_column),
        needs=("path", "image_size"),
        takes=("caption_column", "buckets", "horizontal_flip", *OF_IMAGE_FILES),
    ),
    "prompts": DataSet(
        lambda config: Prompts(
            config.path or "", config.split or "train", config.image_size or 0, config.caption_column
        ),
        needs=("path", "image_size"),
        takes=("split", "caption_column"),
    ),
    "samples": DataSet(
        lambda config: SampledImages(Path(config.path or "")), needs=("path",), takes=("horizontal_flip",)
    ),
    "latents": DataSet(
        lambda config: open_dataset(_made_from(config)), needs=("path",), takes=("horizontal_flip", "verify")
    ),
}


def framing_of(config: DataConfig) -> Framing:
    """How the image files of a data set are cut."""
    size, buckets = config.image_size or 0, config.buckets
    if buckets is None:
        sizes = [(size, size)]
    elif isinstance(buckets, int):
        sizes = buckets_of(size, buckets)
    else:
        sizes = [(height, width) for height, width in buckets]
    return Framing(size, sizes, config.upright, config.background, config.least_size)


def open_dataset(config: DataConfig) -> Images:
    """The images of a data set with their conditions; of latents, the images that they were made from.

    Raises:
        UserError: the files are missing, damaged, or not what the data set is made of.
    """
    return DATASETS[config.name].open(config)


def build_source(config: DataConfig) -> Source:
    """What to train on.

    Raises:
        UserError: as `open_dataset`; or there are no images, or images of several sizes.
    """
    if config.name == "latents":
        folder = Path(config.path or "")
        cached = LatentSource(folder, config.horizontal_flip, config.num_workers, config.verify)
        if processes().is_main_process:
            classes = describe_classes(cached.num_classes, cached.class_names)
            announce(f"{config.name} {folder}: {len(cached):,} images{classes}")
        return cached
    if config.name == "prompts":
        raise no_images(config.path)
    if config.buckets is not None:
        raise UserError(
            "data.buckets: images of several sizes are trained on as `shd-diffusion prepare` writes them; "
            "run it, or remove the key"
        )
    images = open_dataset(config)
    announce_images(images, name_of(config))
    return ImageSource(images, config.horizontal_flip, config.num_workers)


def reference_images(config: DataConfig, encoded: DataConfig | None = None) -> ReferenceImages:
    """The real images that samples are compared with, squares in any case; of latents, those that could be encoded.

    Args:
        config: what a model was trained on.
        encoded: of latents, where the images are now; without it, or if these are latents too, where they were.

    Raises:
        UserError: as `open_dataset`; or there are no images.
    """
    left_out: list[int] | None = None
    if config.name == "latents":
        shards = read_manifest(Path(config.path or ""))["shards"]
        left_out = [image["index"] for shard in shards for image in shard["unreadable"]]
        config = _made_from(config) if encoded is None or encoded.name == "latents" else encoded
    if config.name == "prompts":
        raise no_images(config.path)
    config = config.model_copy(update={"buckets": None})
    images = open_dataset(config)
    announce_images(images, name_of(config))
    return ReferenceImages(images, name_of(config), find_unreadable(images) if left_out is None else left_out)


def name_of(config: DataConfig) -> str:
    """What to call a data set in a message or a report."""
    parts = (config.name, config.path, config.split, config.image_size and f"{config.image_size} px")
    return " ".join(str(part) for part in parts if part)


def caption_of(source: LatentSource, index: int, epoch: int) -> str:
    """The caption that item `index` of a cache has in an epoch, from the data that the cache was made from.

    Raises:
        UserError: they cannot be had any more, are others by now, or have no captions.
    """
    manifest = source.dataset.manifest
    images = open_dataset(DataConfig.model_validate(manifest["data"]))
    if images.fingerprint() != manifest["identity"]["source"]:
        raise UserError("data: are others than the cache was made from; run `shd-diffusion prepare` again")
    left_out = {image["index"] for shard in manifest["shards"] for image in shard["unreadable"]}
    order = (i for bucket in by_size(images).values() for i in bucket if i not in left_out)
    captions = images.captions(next(itertools.islice(order, index, None)))
    if "sampling" in manifest["identity"]:  # the teacher has sampled from the first one
        captions = captions[:1]
    if not captions:
        raise UserError("data: have no captions")
    return captions[caption_number(index, epoch, len(captions))]


def _made_from(config: DataConfig) -> DataConfig:
    """The images that latents were made from."""
    return DataConfig.model_validate(read_manifest(Path(config.path or ""))["data"])
