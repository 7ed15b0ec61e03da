"""A folder of image files, a sub-folder a class."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from shd_diffusion.data.decoding import decode
from shd_diffusion.data.labelled import LabelledImages
from shd_diffusion.errors import UserError


class ImageFolder(LabelledImages):
    """Image files below `folder/<class>/`, classes numbered in the order of their names, as in torchvision.

    Files are read when they are asked for: to look through 1.2 million of them at the start would take hours.

    Args:
        folder: holds a sub-folder a class.
        size: images become (3, size, size); see `decode`.

    Raises:
        UserError: no such folder, no classes, or a class without images.
    """

    def __init__(self, folder: Path, size: int) -> None:
        try:
            _, labels = find_classes(folder)
            files = make_dataset(str(folder), labels, extensions=IMG_EXTENSIONS)
        except OSError as error:
            raise UserError(
                f"data.path: {folder}: not a folder with a sub-folder of images a class ({error})"
            ) from None
        self.folder, self.shape, self.num_classes = folder, (3, size, size), len(labels)
        self.paths = [path for path, _ in files]
        self.labels = torch.tensor([label for _, label in files])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = Path(self.paths[index])
        return decode(path, str(path), self.shape[1]), int(self.labels[index])

    def name(self, index: int) -> str:
        return self.paths[index]

    def fingerprint(self) -> str:
        """Names, sizes in bytes and times of modification of all files."""
        digest = hashlib.sha256()
        for path in map(Path, self.paths):
            status = path.stat()
            digest.update(
                f"{path.relative_to(self.folder)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode()
            )
        return digest.hexdigest()
