"""Data sets of the `datasets` library: on the Hugging Face hub, or files on disk that it can read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shd_diffusion.data.decoding import UnreadableImage, decode
from shd_diffusion.data.image_sets import Images
from shd_diffusion.errors import UserError, one_line


class HubImages(Images):
    """The images of a data set of the `datasets` library.

    Args:
        path: a name on the hub, or a local folder; with the latter nothing is asked of the network.
        split: e.g. `train`.
        size: images become (3, size, size); see `decode`.
        image_column: holds the images.
        label_column: holds the labels, integers from 0 on.

    Raises:
        UserError: the library is not installed, the data set cannot be loaded, or has no such columns.
    """

    labels: Tensor

    def __init__(self, path: str, split: str, size: int, image_column: str, label_column: str) -> None:
        try:
            import datasets
        except ModuleNotFoundError:
            raise UserError(
                "data.name: `huggingface` needs the library `datasets`; pip install 'shd-diffusion[datasets]'"
            ) from None
        try:
            table: Any = datasets.load_dataset(path, split=split)
        except Exception as error:  # the builders of data sets raise errors of any kind
            raise UserError(
                f"data.path: {path}: split `{split}` cannot be loaded as a data set ({one_line(error)}); "
                "give the name of one on the hub or a local folder of images, Parquet or Arrow files"
            ) from None
        for key, column in (("image_column", image_column), ("label_column", label_column)):
            if column not in table.features:
                known = ", ".join(table.features)
                raise UserError(f"data.{key}: {path} has no column `{column}`; known there: {known}")
        if not isinstance(table.features[image_column], datasets.Image):
            raise UserError(
                f"data.image_column: column `{image_column}` of {path} holds no images; give another"
            )
        labels = table[label_column][:]
        if not labels:
            raise UserError(f"data.split: split `{split}` of {path} is empty; give another")
        if not all(isinstance(label, int) and label >= 0 for label in labels):
            raise UserError(
                f"data.label_column: column `{label_column}` of {path} holds more than integers from 0 on; "
                "give another, or convert it with class_encode_column"
            )
        self.path, self.shape = path, (3, size, size)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        classes = table.features[label_column]
        self.num_classes = getattr(classes, "num_classes", None) or max(labels) + 1
        self.class_names = getattr(classes, "names", None)
        self.images = table.select_columns(image_column).cast_column(
            image_column, datasets.Image(decode=False)
        )
        self.image_column, self.split = image_column, split

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        stored = self.images[index][self.image_column]
        file = stored["bytes"] or (Path(stored["path"]) if stored["path"] else None)
        if file is None:
            raise UnreadableImage(f"{self.name(index)}: is empty")
        return decode(file, self.name(index), self.shape[1])

    def name(self, index: int) -> str:
        return f"{self.path}: image {index} of split {self.split}"

    def fingerprint(self) -> str:
        labels = self.labels.numpy().tobytes()
        return hashlib.sha256(self.images._fingerprint.encode() + labels).hexdigest()
