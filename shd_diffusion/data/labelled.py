"""Sets of images with their labels, read one by one."""

from __future__ import annotations

import hashlib
from abc import abstractmethod

from torch import Tensor
from torch.utils.data import Dataset


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """N images with their labels; item i is an 8-bit image (C, H, W) and its label.

    Attributes:
        shape: (C, H, W), the same for all.
        num_classes: labels go from 0 to `num_classes` - 1.
        labels: all of them, (N,).
    """

    shape: tuple[int, int, int]
    num_classes: int
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """An image and its label.

        Raises:
            UnreadableImage: there is an image, but it cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the images do, quick to compute: no image is decoded for it."""


class ImagesInMemory(LabelledImages):
    """Images (N, C, H, W), 8-bit, and their labels (N,), int64."""

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int, origin: str) -> None:
        self.images, self.labels, self.num_classes, self.origin = images, labels, num_classes, origin
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.origin}: image {index}"

    def fingerprint(self) -> str:
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()
