"""A folder of image files: with captions; or a sub-folder a class; or a flat one, without classes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from shd_diffusion.data.folder_captions import BESIDE, METADATA, captions_beside, captions_from_metadata
from shd_diffusion.data.framing import Framing
from shd_diffusion.data.image_sets import ImageFiles
from shd_diffusion.errors import UserError, printable_path
from shd_diffusion.files import json_sha256
from shd_diffusion.progress import announce


class ImageFolder(ImageFiles):
    """Image files below `folder/<class>/`, classes numbered in the order of their names, as in torchvision.

    A folder without sub-folders has no classes: its images are unconditional. With captions sub-folders are no
    classes either. Images are read when they are asked for: to look through 1.2 million of them at the start would
    take hours.

    Args:
        folder: holds a sub-folder a class, or the images.
        framing: how images are cut.
        caption_column: the key of the captions in `metadata.jsonl`; `txt` for a .txt beside each image; None without.

    Raises:
        UserError: no such folder, no images, a class without any, a link that leads round in a circle, or an image
            without a caption.
    """

    def __init__(self, folder: Path, framing: Framing, caption_column: str | None = None) -> None:
        super().__init__(framing)
        self.folder, self.caption_column = folder, caption_column
        try:
            self.paths, metadata = image_files(folder)
            classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        except OSError as error:
            raise UserError(
                f"data.path: {printable_path(folder)}: not a readable folder ({error.strerror}); "
                "give one of images, or with a sub-folder of them a class"
            ) from None
        except UserError as error:
            raise UserError(f"data.path: {error}") from None
        if classes and caption_column is None:
            numbers = {name: number for number, name in enumerate(classes)}
            groups = [os.path.relpath(path, folder).partition(os.sep) for path in self.paths]
            self.paths = [path for path, (_, inside, _) in zip(self.paths, groups, strict=True) if inside]
            self.labels = torch.tensor([numbers[name] for name, inside, _ in groups if inside])
            self.num_classes, self.class_names = len(classes), list(map(printable_path, classes))
            tell_order(folder, classes)
            if beside := sum(not inside for _, inside, _ in groups):
                announce(
                    f"{printable_path(folder)}: {beside:,} images beside the class folders have no class and are left "
                    "out; move them into one"
                )
            if empty := set(range(len(classes))) - set(self.labels.tolist()):
                names = ", ".join(self.class_names[number] for number in sorted(empty))
                raise UserError(
                    f"data.path: {printable_path(folder)}: no images of {names}; add some, or remove it"
                )
        elif not self.paths:
            raise UserError(f"data.path: {printable_path(folder)}: no images in it; give another folder")
        if caption_column == BESIDE:
            self.texts = captions_beside(self.paths)
        elif caption_column is not None:
            self.texts = captions_from_metadata(folder, self.paths, metadata, caption_column)

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        return Path(self.paths[index])

    def captions(self, index: int) -> list[str]:
        return [] if self.caption_column is None else self.texts[index]

    def name(self, index: int) -> str:
        return printable_path(self.paths[index])

    def content(self) -> str:
        """Names and sizes of all images, some of the images themselves, and the captions of all; no times, since a copy
        has others."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(os.fsencode(os.path.relpath(path, self.folder)))
            try:
                digest.update(f"\0{Path(path).stat().st_size}\0".encode())
            except OSError:  # a link that leads nowhere is an image that cannot be read
                digest.update(b"\0unreadable\0")
        for file in self.some_files():
            digest.update(file)
        if self.caption_column is not None:
            digest.update(json_sha256(self.texts).encode())
        return digest.hexdigest()


def tell_order(folder: Path, classes: Sequence[str]) -> None:
    """Tell of class folders that are named by numbers, but not numbered by them: 0, 1, 10, 2."""
    if all(name.isdecimal() for name in classes) and list(classes) != sorted(classes, key=int):
        shown = ", ".join(classes[:4])
        announce(
            f"{printable_path(folder)}: classes are numbered in the order of their names as texts ({shown}, ...), as "
            "in torchvision; for that of the numbers write all of them with as many digits"
        )


def image_files(folder: Path) -> tuple[list[str], list[str]]:
    """All image files below a folder in torchvision's order, links followed; and all files `metadata.jsonl`.

    Raises:
        OSError: a folder cannot be read.
        UserError: a link leads back to a folder that it lies in.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS  # slow to import

    def refuse(error: OSError) -> None:
        raise error

    files, metadata = [], []
    above = {os.fspath(folder): [os.path.realpath(folder)]}  # real paths down to each folder
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        for path in (f"{root}{os.sep}{name}" for name in folders):
            real = os.path.realpath(path)
            if real in above[root]:
                raise UserError(f"{printable_path(path)}: links to a folder that it lies in; remove it")
            above[path] = [*above[root], real]
        files += [f"{root}{os.sep}{name}" for name in names if name.lower().endswith(IMG_EXTENSIONS)]
        metadata += [f"{root}{os.sep}{METADATA}"] if METADATA in names else []
    return sorted(files, key=os.path.split), metadata
