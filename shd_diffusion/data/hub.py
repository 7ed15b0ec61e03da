"""Data sets of the `datasets` library: on the Hugging Face hub, or files on disk that it can read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from shd_diffusion.data.captions import captions_of
from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.framing import Framing
from shd_diffusion.data.image_sets import ImageFiles
from shd_diffusion.errors import UserError, did_you_mean, one_line
from shd_diffusion.files import json_sha256
from shd_diffusion.models.hub import go_offline_without_hub, try_hub


class HubImages(ImageFiles):
    """The images of a data set of the `datasets` library.

    Args:
        path: a name on the hub, or a local folder; with the latter nothing is asked of the network.
        split: e.g. `train`.
        framing: how images are cut.
        image_column: holds the images.
        label_column: holds the labels, integers from 0 on; None for no labels.
        caption_column: holds the captions, strings or lists of strings; None for no captions.

    Raises:
        UserError: the library is not installed, the data set cannot be loaded, has no such columns, or an image has
            no label or caption.
    """

    def __init__(
        self,
        path: str,
        split: str,
        framing: Framing,
        image_column: str = "image",
        label_column: str | None = "label",
        caption_column: str | None = None,
    ) -> None:
        super().__init__(framing)
        table = load_table(path, split)
        self.path, self.split = path, split
        self.image_column, self.caption_column = image_column, caption_column
        self.images = _images(table, image_column, path)
        if label_column is not None:
            check_column(table, "label_column", label_column, path)
            labels = _labels(table, label_column, path)
            self.labels = torch.tensor(labels, dtype=torch.int64)
            classes = table.features[label_column]
            self.num_classes = getattr(classes, "num_classes", None) or max(labels) + 1
            self.class_names = getattr(classes, "names", None)
        if caption_column is not None:
            self.texts = caption_table(table, caption_column, path, self.name)

    def __len__(self) -> int:
        return len(self.images)

    def file(self, index: int) -> Path | bytes:
        stored = self.images[index][self.image_column]
        file: Path | bytes | None = stored["bytes"] or (Path(stored["path"]) if stored["path"] else None)
        if file is None:
            raise UnreadableImage(f"{self.name(index)}: is empty")
        return file

    def captions(self, index: int) -> list[str]:
        if self.caption_column is None:
            return []
        return captions_at(self.texts, index, self.caption_column)

    def name(self, index: int) -> str:
        return f"{self.path}: image {index} of split {self.split}"

    def content(self) -> str:
        """The sizes of all images and some of the images themselves, labels and captions: the library's own fingerprint
        is another as soon as files were copied or moved."""
        digest = hashlib.sha256()
        for batch in self.images.with_format("arrow").iter(1000):
            digest.update(repr(_sizes(batch[self.image_column])).encode())
        for file in self.some_files():
            digest.update(file)
        if self.labels is not None:
            digest.update(self.labels.numpy().tobytes())
        if self.caption_column is not None:
            for part in caption_hashes(self.texts, self.caption_column):
                digest.update(part)
        return digest.hexdigest()


def load_table(path: str, split: str) -> Any:
    """A split of a data set, a `datasets.Dataset` of one item or more.

    Raises:
        UserError: the library is not installed, the data set cannot be loaded, or the split is empty.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise UserError(
            f"data.path: {path} needs the library `datasets`; pip install 'shd-diffusion[datasets]'"
        ) from None
    try:
        if not Path(path).exists():
            if "/" in path and not try_hub(path):
                raise ValueError("no such folder here")
            go_offline_without_hub()
        table: Any = datasets.load_dataset(path, split=split)
    except Exception as error:  # the builders of data sets raise errors of any kind
        raise UserError(
            f"data.path: {path}: split `{split}` cannot be loaded as a data set ({one_line(error)}); "
            "give the name of one on the hub or a local folder of images, Parquet or Arrow files"
        ) from None
    if not len(table):
        raise UserError(f"data.split: split `{split}` of {path} is empty; give another")
    return table


def check_column(table: Any, key: str, column: str, path: str) -> None:
    """See that a table has a column.

    Raises:
        UserError: it has not.
    """
    if column not in table.features:
        known = did_you_mean(column, table.features)
        none = ", or null for none" if key.startswith(("label", "caption")) else ""
        raise UserError(f"data.{key}: {path} has no column `{column}`; {known}{none}")


def caption_table(table: Any, column: str, path: str, name: Callable[[int], str]) -> Any:
    """The captions alone, each of which has been looked at.

    Args:
        table: a `datasets.Dataset`.
        column: holds strings or lists of strings.
        path: of the data set, for messages.
        name: what to call an item in a message.

    Raises:
        UserError: there is no such column, or an item has no caption.
    """
    check_column(table, "caption_column", column, path)
    texts = table.select_columns(column)
    start = 0
    for batch in texts.iter(1000):
        for index, caption in enumerate(batch[column], start):
            captions_of(caption, f"{name(index)}: column `{column}`")
        start += len(batch[column])
    return texts


def caption_hashes(texts: Any, column: str) -> Iterator[bytes]:
    """Hashes of the captions of a `caption_table`, which are the same of a copy, unlike the library's own."""
    return (json_sha256(batch[column]).encode() for batch in texts.iter(1000))


def captions_at(texts: Any, index: int, column: str) -> list[str]:
    """The captions of an item of a `caption_table`."""
    value = texts[index][column]
    return value if isinstance(value, list) else [value]


def _images(table: Any, column: str, path: str) -> Any:
    """The images alone, as the files that are stored."""
    import datasets

    check_column(table, "image_column", column, path)
    if not isinstance(table.features[column], datasets.Image):
        raise UserError(f"data.image_column: column `{column}` of {path} holds no images; give another")
    return table.select_columns(column).cast_column(column, datasets.Image(decode=False))


def _sizes(images: Any) -> list[int | None]:
    """In bytes, of stored images (an Arrow array of bytes and paths); None where there is no file."""
    from pyarrow import compute

    within = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
    if None not in within:
        return within
    paths = compute.struct_field(images, "path").to_pylist()
    return [_size(path) if size is None else size for size, path in zip(within, paths, strict=True)]


def _size(path: str | None) -> int | None:
    try:
        return None if path is None else Path(path).stat().st_size
    except OSError:  # an image that cannot be read
        return None


def _labels(table: Any, column: str, path: str) -> list[int]:
    labels: list[int] = table[column][:]
    if not all(isinstance(label, int) and label >= 0 for label in labels):
        raise UserError(
            f"data.label_column: column `{column}` of {path} holds more than integers from 0 on; "
            "give another, or convert it with class_encode_column"
        )
    return labels
