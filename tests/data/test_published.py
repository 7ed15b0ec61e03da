"""Fashion-MNIST and CIFAR-10 from files that the tests write by the published formats."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from shd_diffusion.config import DataConfig
from shd_diffusion.data import build_source
from shd_diffusion.data.published import DEBIAN_FASHION_MNIST, cifar10, fashion_mnist
from shd_diffusion.errors import UserError


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 28, 28), dtype=np.uint8)
    labels = np.array([9, 0, 1, 2, 3, 4, 5], dtype=np.uint8)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return tmp_path, images, labels


def test_fashion_mnist_is_read_and_padded(fashion):
    folder, images, labels = fashion
    source = build_source(DataConfig(name="fashion_mnist", path=str(folder)))
    clean, found = source.first(7)
    assert (source.shape, source.num_classes, len(source)) == ((1, 32, 32), 10, 7)
    assert found["class_labels"].tolist() == labels.tolist()
    np.testing.assert_allclose(clean[:, 0, 2:-2, 2:-2].numpy(), images / 127.5 - 1, atol=1e-6)
    clean[:, :, 2:-2, 2:-2] = -1
    assert (clean == -1).all()  # the border is black


def test_damage_in_fashion_mnist_is_named(fashion):
    folder, images, _ = fashion
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for content in (
        whole[:-20],
        b"no gzip",
        gzip.compress(gzip.decompress(whole)[:-1]),
        gzip.compress(b"\0\0\r\3"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz is damaged") as error:
            fashion_mnist(folder, "train")
        assert "\n" not in str(error.value)
    write_idx(path, images[:5])
    with pytest.raises(UserError, match="7 labels of 5 images"):
        fashion_mnist(folder, "train")
    assert len(fashion_mnist(folder, "test")) == 7
    path.unlink()
    with pytest.raises(UserError, match=r"is missing.*dataset-fashion-mnist.*data\.path"):
        fashion_mnist(folder, "train")
    with pytest.raises(UserError, match=r"data\.split.*train, test"):
        fashion_mnist(folder, "valid")


@pytest.mark.skipif(
    not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_of_debian():
    train, test = fashion_mnist(None, "train"), fashion_mnist(None, "test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert train.labels.bincount().tolist() == [6000] * 10
    # Mean and deviation that the data set is commonly normalised with, of the 28×28 pixels.
    inner = train.images[:, :, 2:-2, 2:-2].float() / 255
    assert inner.mean().item() == pytest.approx(0.2860, abs=1e-4)
    assert inner.std().item() == pytest.approx(0.3530, abs=1e-4)


def write_cifar10(folder: Path, count: int = 4) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    written = {}
    for name in [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]:
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        labels = rng.integers(0, 10, count)
        with (folder / name).open("wb") as file:
            for image, label in zip(images, labels, strict=True):
                file.write(struct.pack("B", label))
                for channel in range(3):
                    file.write(struct.pack("1024B", *image[:, :, channel].flatten()))
        written[name] = images, labels
    return written


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar10_is_read_from_its_binary_version(tmp_path: Path, inside: str):
    written = write_cifar10(tmp_path / "cifar" / inside)
    data = cifar10(tmp_path / "cifar", "train")
    assert (len(data), data.shape) == (20, (3, 32, 32))
    images, labels = written["data_batch_3.bin"]
    for row in range(4):
        item = data[8 + row]
        assert item["class_labels"] == labels[row]
        assert torch.equal(item["image"], torch.from_numpy(images[row]).permute(2, 0, 1))
    assert cifar10(tmp_path / "cifar", "test")[0]["class_labels"] == written["test_batch.bin"][1][0]


def test_damage_in_cifar10_is_named(tmp_path: Path):
    folder = tmp_path / "cifar"
    with pytest.raises(UserError, match=r"data_batch_1\.bin is missing.*cifar-10-binary"):
        cifar10(folder, "train")
    write_cifar10(folder)
    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"data_batch_2\.bin is damaged"):
        cifar10(folder, "train")
    path.write_bytes(b"\x0b" + bytes(3072))
    with pytest.raises(UserError, match="label of 11"):
        cifar10(folder, "train")
