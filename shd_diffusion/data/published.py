"""Fashion-MNIST and CIFAR-10, read from the files that their authors publish."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shd_diffusion.data.image_sets import ImagesInMemory
from shd_diffusion.errors import UserError, one_line

NUM_CLASSES = 10  # of both
MOST_IMAGES = 60_000

Files = TypeVar("Files")

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_FILES = {"train": "train", "test": "t10k"}
FASHION_MNIST_SOURCE = (
    "Debian's package (`apt-get install dataset-fashion-mnist`) or github.com/zalandoresearch/fashion-mnist"
)

CIFAR10_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR10_SOURCE = "cifar-10-binary.tar.gz of www.cs.toronto.edu/~kriz/cifar.html, unpacked"
CIFAR10_RECORD = 1 + 3 * 32 * 32  # the label, then the red, the green and the blue plane, by rows


def fashion_mnist(folder: Path | None, split: str) -> ImagesInMemory:
    """Fashion-MNIST (Xiao et al. 2017), padded by 2 black pixels on each side: (1, 32, 32).

    Args:
        folder: holds the four `.gz` files; None for where Debian's package puts them.
        split: `train` (60,000) or `test` (10,000).

    Raises:
        UserError: a file is missing or damaged.
    """
    folder = folder or DEBIAN_FASHION_MNIST
    prefix = _split(FASHION_MNIST_FILES, split)
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (28, 28), FASHION_MNIST_SOURCE)
    path = folder / f"{prefix}-labels-idx1-ubyte.gz"
    labels = read_idx(path, (), FASHION_MNIST_SOURCE)
    if len(images) != len(labels):
        raise _damaged(path, FASHION_MNIST_SOURCE, f"{len(labels)} labels of {len(images)} images")
    _check_labels(labels, path, FASHION_MNIST_SOURCE)
    return ImagesInMemory(
        F.pad(images[:, None], (2, 2, 2, 2)), labels.long(), NUM_CLASSES, f"Fashion-MNIST ({split})"
    )


def read_idx(path: Path, item: tuple[int, ...], source: str) -> Tensor:
    """A gzipped IDX file: two zero bytes, 8 for unsigned bytes, the number of axes, big-endian sizes, data.

    torchvision's reader takes no gzipped file. No more is unpacked than Fashion-MNIST has.

    Args:
        path: the file.
        item: shape of an item, (28, 28) of images, () of labels.
        source: where the file is published, for messages.

    Returns:
        (N, *item), uint8, 0 < N <= 60,000.

    Raises:
        UserError: the file is missing or damaged.
    """
    header = 8 + 4 * len(item)
    try:
        with gzip.open(path) as file:
            content = file.read(header + MOST_IMAGES * math.prod(item) + 1)
    except FileNotFoundError:
        raise _missing(path, source) from None
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, source, one_line(error)) from None
    count = int.from_bytes(content[4:8])
    start = bytes((0, 0, 8, 1 + len(item))) + np.array([count, *item], ">u4").tobytes()
    if not content.startswith(start):
        raise _damaged(path, source, f"no IDX header of bytes {('N', *item)}")
    if not 0 < count <= MOST_IMAGES or len(content) != header + count * math.prod(item):
        raise _damaged(path, source, f"it does not hold the {count} items of its header")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(count, *item).copy())


def cifar10(folder: Path, split: str) -> ImagesInMemory:
    """CIFAR-10 (Krizhevsky 2009), (3, 32, 32), from its binary version: torchvision's reader unpickles the other.

    Args:
        folder: holds the `.bin` files, or `cifar-10-batches-bin` with them.
        split: `train` (50,000) or `test` (10,000).

    Raises:
        UserError: a file is missing or damaged.
    """
    names = _split(CIFAR10_FILES, split)
    inner = folder / "cifar-10-batches-bin"
    records = torch.cat([_read_cifar10(inner / name if inner.is_dir() else folder / name) for name in names])
    images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()
    return ImagesInMemory(images, labels, NUM_CLASSES, f"CIFAR-10 ({split})")


def _read_cifar10(path: Path) -> Tensor:
    """Records (N, 3073) of a file."""
    try:
        content = np.fromfile(path, np.uint8)
    except FileNotFoundError:
        raise _missing(path, CIFAR10_SOURCE) from None
    except OSError as error:
        raise _damaged(path, CIFAR10_SOURCE, one_line(error)) from None
    if not len(content) or len(content) % CIFAR10_RECORD:
        raise _damaged(path, CIFAR10_SOURCE, f"{len(content)} bytes are no multiple of {CIFAR10_RECORD}")
    records = torch.from_numpy(content.reshape(-1, CIFAR10_RECORD))
    _check_labels(records[:, 0], path, CIFAR10_SOURCE)
    return records


def _check_labels(labels: Tensor, path: Path, source: str) -> None:
    if labels.max() >= NUM_CLASSES:
        raise _damaged(path, source, f"a label of {labels.max()}; they go from 0 to 9")


def _split(files: dict[str, Files], split: str) -> Files:
    if split not in files:
        raise UserError(f"data.split: no split `{split}`; known here: {', '.join(files)}")
    return files[split]


def _missing(path: Path, source: str) -> UserError:
    return UserError(f"data.path: {path} is missing; get it from {source}, and set data.path to its folder")


def _damaged(path: Path, source: str, reason: str) -> UserError:
    return UserError(f"data.path: {path} is damaged ({reason}); get it again from {source}")
