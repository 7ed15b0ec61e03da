"""Sets of images with their captions and conditions, read one by one."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shd_diffusion.data.decoding import UnreadableImage, decode, read_geometry
from shd_diffusion.data.framing import Framing, Geometry, Size
from shd_diffusion.data.images import to_rgb
from shd_diffusion.files import json_sha256

LOOKED_AT = 100  # files that are read for a fingerprint


class Images(Dataset[dict[str, Tensor]]):
    """N images with their conditions; item i is {"image": uint8 (C, H, W), **condition}.

    Attributes:
        shape: (C, H, W), the same for all; with several buckets that of the square which they have the pixels of.
        labels: classes of all images, (N,) int64, from 0 to `num_classes` - 1; None without classes.
        num_classes: None without classes.
        class_names: of all classes, where they have names.
        null: the condition that stands for none, (1, ...) by argument, as far as the data know it.
    """

    shape: tuple[int, int, int]
    labels: Tensor | None = None
    num_classes: int | None = None
    class_names: list[str] | None = None
    null: dict[str, Tensor] = {}  # noqa: RUF012 -- never changed in place

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> Tensor:
        """An image, uint8 (C, H, W).

        Raises:
            UnreadableImage: there is one, but it cannot be read.
        """

    @property
    def buckets(self) -> Sequence[Size]:
        """The sizes (H, W) that images come in: one, or several, see `geometry` for which is whose."""
        return [self.shape[1:]]

    def geometry(self, index: int) -> Geometry:
        """The size of an image, and how it came about; no pixels are decoded for it.

        Raises:
            UnreadableImage: as for `image`, if that can be seen so far.
        """
        return Geometry(self.shape[1:], (0, 0), self.shape[1:])

    def condition(self, index: int) -> dict[str, Tensor]:
        """What the model is told of an image, by argument of the denoiser; the same names for all."""
        return {} if self.labels is None else {"class_labels": self.labels[index]}

    def captions(self, index: int) -> list[str]:
        """What is said of an image, one text or more; empty where the data set has no captions."""
        return []

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": self.image(index), **self.condition(index)}

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message, in one line."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when images, captions or conditions do, quick to compute: no image is decoded for it."""


class ImageFiles(Images):
    """Images that are decoded from files, (3, H, W); see `decode`."""

    def __init__(self, framing: Framing) -> None:
        self.framing, self.shape = framing, (3, framing.image_size, framing.image_size)

    @abstractmethod
    def file(self, index: int) -> Path | bytes:
        """The path or the content of an image file.

        Raises:
            UnreadableImage: there is none.
        """

    @abstractmethod
    def content(self) -> str:
        """A hash that changes when image files, captions or conditions do; nothing is decoded for it."""

    def some_files(self) -> Iterator[bytes]:
        """The content of some image files, evenly spread: it tells data sets apart whose sizes are the same."""
        for index in range(0, len(self), -(-len(self) // LOOKED_AT)):
            with suppress(UnreadableImage, OSError):
                file = self.file(index)
                yield file if isinstance(file, bytes) else file.read_bytes()

    @property
    def buckets(self) -> Sequence[Size]:
        return self.framing.buckets

    def image(self, index: int) -> Tensor:
        return decode(self.file(index), self.name(index), self.framing)

    def geometry(self, index: int) -> Geometry:
        return read_geometry(self.file(index), self.name(index), self.framing)

    def fingerprint(self) -> str:
        framing = asdict(self.framing)
        if len(self.buckets) == 1:  # the size of all, which `shape` tells
            del framing["image_size"], framing["buckets"]
        return json_sha256([self.content(), framing])


class ImagesInMemory(Images):
    """Images (N, C, H, W), 8-bit, and their labels (N,), int64."""

    labels: Tensor

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int, origin: str) -> None:
        self.images, self.labels, self.num_classes, self.origin = images, labels, num_classes, origin
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"{self.origin}: image {index}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


class ReferenceImages(Dataset[Tensor]):
    """Real images as an evaluation compares with: item i is uint8 RGB (3, H, W).

    Args:
        images: the data set.
        source: what to call it in a report.
        left_out: indices of images that do not take part.
    """

    def __init__(self, images: Images, source: str, left_out: Collection[int] = ()) -> None:
        self.images, self.source = images, source
        kept = torch.ones(len(images), dtype=torch.bool)
        kept[list(left_out)] = False
        self.indices = kept.nonzero()[:, 0]
        self.labels = None if images.labels is None else images.labels[self.indices]
        self.class_names = images.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return to_rgb(self.images.image(int(self.indices[index])))

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return self.images.name(int(self.indices[index]))

    def captions(self) -> list[list[str]] | None:
        """The captions of each image; None where the data set has none. No image is decoded for it."""
        if not len(self) or not self.images.captions(int(self.indices[0])):
            return None
        return [self.images.captions(index) for index in self.indices.tolist()]

    def sha256(self) -> str:
        """A hash of what the images follow from; see `Images.fingerprint`."""
        parts = (self.images.fingerprint(), self.images.shape, self.indices.tolist())
        return hashlib.sha256(str(parts).encode()).hexdigest()
