"""Sets of images, read one by one: a tensor, a folder of files, or an .npz as the ADM suite writes them."""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from shd_diffusion.data.decoding import centre_square, decode
from shd_diffusion.data.folder import image_files
from shd_diffusion.errors import UserError, one_line, printable_path
from shd_diffusion.files import sha256

LARGEST_IN_MEMORY = 2**34  # bytes of a compressed array; ImageNet's 50,000 at 256×256 are 0.6 of it


class ImageSet(Protocol):
    """N images; item j is uint8 (3, H, W).

    Attributes:
        labels: classes of the images, (N,), where they are known.
        class_names: of the classes by their numbers, where they have names.
    """

    labels: Tensor | None = None
    class_names: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Tensor: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message."""

    @abstractmethod
    def sha256(self) -> str:
        """A hash of all that the images follow from."""

    def captions(self) -> list[list[str]] | None:
        """The captions of each image, where they are known."""
        return None


class ArrayImages(ImageSet):
    """Images of an array (N, H, W, 3), which may be one that is mapped from a file."""

    def __init__(self, array: np.ndarray, source: str, labels: Tensor | None = None) -> None:
        self.array, self.source, self.labels = array, source, labels

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.array[index].copy()).permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"{self.source}: image {index}"

    def sha256(self) -> str:
        digest = hashlib.sha256(str(self.array.shape).encode())
        for image in self.array:
            digest.update(image.tobytes())
        return digest.hexdigest()


class FolderImages(ImageSet):
    """Image files; grey ones become RGB.

    Where every file lies in a subfolder, the subfolders are the classes, numbered in their order.

    Args:
        paths: of the files; by default all that training would find in the folder, in the order of their paths.
    """

    def __init__(self, folder: Path, paths: Sequence[Path] | None = None) -> None:
        self.folder = folder
        self.paths = paths or sorted(map(Path, image_files(folder)[0]))
        if not self.paths:
            raise UserError(f"{folder}: no image files here; sample first, or give another folder")
        groups = [path.relative_to(folder).parts[0] for path in self.paths]
        if all(path.parent != folder for path in self.paths):
            classes = sorted(set(groups))
            numbers = {group: number for number, group in enumerate(classes)}
            self.class_names = list(map(printable_path, classes))
            self.labels = torch.tensor([numbers[group] for group in groups])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return decode(self.paths[index], self.name(index))

    def name(self, index: int) -> str:
        return printable_path(self.paths[index])

    def sha256(self) -> str:
        digest = hashlib.sha256(b"upright, on white")  # see `decode`
        for path in self.paths:
            digest.update(os.fsencode(path.relative_to(self.folder)) + b"\0")
            digest.update(bytes.fromhex(sha256(path)))
        return digest.hexdigest()


class ResizedImages(ImageSet):
    """The centre squares of images, `size` wide, resized by a filter of Pillow."""

    def __init__(self, images: ImageSet, size: int, resize: str) -> None:
        self.images, self.size, self.resize = images, size, resize
        self.labels, self.class_names = images.labels, images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        resample = Image.Resampling[self.resize.upper()]
        return pil_to_tensor(
            centre_square(to_pil_image(self.images[index]), self.size, resample, halve=False)
        )

    def name(self, index: int) -> str:
        return self.images.name(index)

    def sha256(self) -> str:
        return hashlib.sha256(f"{self.images.sha256()} {self.resize} {self.size}".encode()).hexdigest()

    def captions(self) -> list[list[str]] | None:
        return self.images.captions()


def tensor_images(images: Tensor, source: str, labels: Tensor | None = None) -> ArrayImages:
    """A set of 8-bit images (N, 3, H, W).

    Raises:
        ValueError: another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images are uint8 (N, 3, H, W), not {images.dtype} {tuple(images.shape)}")
    return ArrayImages(images.permute(0, 2, 3, 1).cpu().numpy(), source, labels)


def open_image_files(path: Path) -> ImageSet:
    """The images of a folder, or of `arr_0` (N, H, W, 3) in an .npz; `arr_1` holds their labels, if present.

    Raises:
        UserError: nothing there, or not images.
    """
    if path.is_dir():
        return FolderImages(path)
    if path.suffix != ".npz":
        raise UserError(f"{path}: neither a folder of images nor an .npz file")
    arrays = open_npz(path)
    images, labels = arrays.get("arr_0"), arrays.get("arr_1")
    if images is None:
        raise UserError(
            f"{path}: has no images `arr_0` (keys: {', '.join(arrays)}); write it by `np.savez(FILE, images)`"
        )
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise UserError(f"{path}: `arr_0` is {images.dtype} {images.shape}; images are uint8 (N, H, W, 3)")
    if labels is None:
        return ArrayImages(images, str(path))
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: `arr_1` is {labels.dtype} {labels.shape}; labels are integers ({len(images)},)"
        )
    return ArrayImages(images, str(path), torch.from_numpy(labels.astype(np.int64)))


def open_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz; uncompressed ones are mapped, so that 50,000 images fit any memory.

    Raises:
        UserError: the file is missing or damaged, or holds pickled objects, which are never loaded.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = {Path(member.filename).stem: member for member in archive.infolist()}
            return {key: _open_array(path, file, archive, member) for key, member in members.items()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None
    except Exception as error:  # zipfile, zlib and NumPy's headers raise errors of any kind on damaged files
        raise UserError(f"{path}: not an .npz of plain arrays ({one_line(error)})") from None


def _open_array(path: Path, file: BinaryIO, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        read_header: Any = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read_header(stream)
        start = stream.tell()
        order: Any = "F" if fortran else "C"
        if dtype.hasobject:
            raise ValueError(f"`{member.filename}` holds pickled objects")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != member.file_size - start:
            raise ValueError(f"`{member.filename}` is not as long as its header says")
        if member.compress_type != zipfile.ZIP_STORED and member.file_size <= LARGEST_IN_MEMORY:
            return np.frombuffer(stream.read(), dtype).reshape(shape, order=order)
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(
            f"`{member.filename}` is too large to unpack, {member.file_size} bytes; save it by np.savez"
        )
    # The member's own header: 30 bytes, of which the last 4 are the lengths of the name and the extra field.
    file.seek(member.header_offset + 26)
    name, extra = np.frombuffer(file.read(4), "<u2").astype(int)
    return np.memmap(path, dtype, "r", member.header_offset + 30 + name + extra + start, shape, order)
