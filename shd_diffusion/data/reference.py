"""Real images as an evaluation compares with: read one by one, in three channels."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch
from torch import Tensor
from torch.utils.data import Dataset

from shd_diffusion.data.labelled import LabelledImages


class ReferenceImages(Dataset[Tensor]):
    """Item i is 8-bit RGB (3, H, W); grey images get three equal channels.

    Args:
        images: the data set.
        source: what to call it in a report.
        left_out: indices of images that do not take part.
    """

    labels: Tensor | None

    def __init__(self, images: LabelledImages, source: str, left_out: Collection[int] = ()) -> None:
        self.images, self.source = images, source
        kept = torch.ones(len(images), dtype=torch.bool)
        kept[list(left_out)] = False
        self.indices = kept.nonzero()[:, 0]
        self.labels = images.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        image, _ = self.images[int(self.indices[index])]
        return image.expand(3, -1, -1)

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        return self.images.name(int(self.indices[index]))

    def sha256(self) -> str:
        """A hash of what the images follow from; see `LabelledImages.fingerprint`."""
        parts = (self.images.fingerprint(), self.images.shape, self.indices.tolist())
        return hashlib.sha256(str(parts).encode()).hexdigest()
