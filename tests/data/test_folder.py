"""Image folders and data sets of the `datasets` library."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import NUM_IMAGES, SIZE
from PIL import Image
from torchvision.datasets import ImageFolder as TorchvisionFolder

from shd_diffusion.config import DataConfig
from shd_diffusion.data import build_source, reference_images
from shd_diffusion.data.decoding import centre_square
from shd_diffusion.errors import UserError


def folder_config(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(name="image_folder", path=str(folder), image_size=SIZE, **changes)


def test_classes_and_order_are_those_of_torchvision(images: Path):
    source = build_source(folder_config(images))
    expected = TorchvisionFolder(str(images))
    assert (len(source), source.num_classes, source.shape) == (NUM_IMAGES, 2, (3, SIZE, SIZE))
    assert source.dataset.labels.tolist() == expected.targets
    assert [source.dataset.name(index) for index in range(len(source))] == [
        path for path, _ in expected.samples
    ]


def test_a_square_keeps_the_centre_and_its_colours():
    """A wide image, blue left and right of a red square with a green centre: only the square is left."""
    pixels = np.zeros((64, 200, 3), np.uint8)
    pixels[:, :, 2] = 255
    pixels[:, 68:132] = (255, 0, 0)
    pixels[24:40, 92:108] = (0, 255, 0)
    square = np.array(centre_square(Image.fromarray(pixels), 16)).astype(int)
    expected = np.zeros((16, 16, 3), int)
    expected[:, :] = (255, 0, 0)
    expected[6:10, 6:10] = (0, 255, 0)
    assert square.shape == (16, 16, 3)
    assert np.abs(square - expected).max() <= 1  # 64 -> 32 -> 16 by boxes alone: exact


def test_small_images_are_enlarged_bicubically():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 13, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = np.array(image.resize((21, 16), Image.Resampling.BICUBIC))[:, 2:18]
    assert np.array_equal(np.array(centre_square(image, 16)), expected)


def test_flips_are_the_drawn_ones(images: Path):
    plain, flipping = (build_source(folder_config(images, horizontal_flip=flip)) for flip in (False, True))
    items = {"image": torch.stack([plain.dataset[index]["image"] for index in range(4)])}
    drawn = torch.tensor([True, False, False, True])
    straight = items["image"].float() / 127.5 - 1
    assert torch.equal(plain.clean(items, drawn, None), straight)
    flipped = flipping.clean(items, drawn, None)
    for index in range(4):
        assert torch.equal(flipped[index], straight[index].flip(-1) if drawn[index] else straight[index])


def test_folders_that_are_none(tmp_path: Path, images: Path):
    with pytest.raises(UserError, match=r"data\.path.*nowhere"):
        build_source(folder_config(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        build_source(folder_config(tmp_path / "empty"))
    (images / "mouse").mkdir()
    with pytest.raises(UserError, match="mouse"):
        build_source(folder_config(images))


def test_reference_images_are_rgb_bytes(images: Path):
    reference = reference_images(folder_config(images))
    assert len(reference) == NUM_IMAGES and reference[3].shape == (3, SIZE, SIZE)
    assert reference[3].dtype == torch.uint8 and reference.labels is not None
    digits = reference_images(DataConfig(name="digits"))
    assert len(digits) == 1797 and digits[0].shape == (3, 8, 8)
    assert digits.source == "digits"


def test_a_fingerprint_follows_the_files(images: Path):
    def fingerprint() -> str:
        return build_source(folder_config(images)).dataset.fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    copied = images.with_name("copied")
    shutil.copytree(images, copied, copy_function=shutil.copyfile)  # with times of its own
    assert build_source(folder_config(copied)).dataset.fingerprint() == before
    file = images / "dog" / "12.png"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    assert fingerprint() != before
    file.write_bytes(content)
    file.rename(images / "cat" / "12.png")
    assert fingerprint() != before


def test_a_local_data_set_of_the_library(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset(
        "imagefolder", data_dir=str(images), split="train", cache_dir=str(tmp_path / "cache")
    )
    (tmp_path / "table").mkdir()
    table.to_parquet(tmp_path / "table" / "train-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def config(**changes: object) -> DataConfig:
        return DataConfig(name="huggingface", path=str(tmp_path / "table"), image_size=SIZE, **changes)

    source, folder = build_source(config()), build_source(folder_config(images))
    assert (len(source), source.num_classes) == (NUM_IMAGES, 2)
    assert source.dataset.labels.tolist() == folder.dataset.labels.tolist()
    for index in (0, 7, 13):
        assert torch.equal(source.dataset[index]["image"], folder.dataset[index]["image"])
    assert source.dataset.fingerprint() == build_source(config()).dataset.fingerprint()
    with pytest.raises(UserError, match=r"image_column.*no column `picture`.*image, label"):
        build_source(config(image_column="picture"))
    with pytest.raises(UserError, match="split `test`") as error:
        build_source(config(split="test"))
    assert "\n" not in str(error.value)


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"shd-diffusion\[datasets\]"):
        build_source(DataConfig(name="huggingface", path="somewhere", image_size=8))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "image_folder", "path": "x"}, "`image_folder` needs the key `image_size`"),
        ({"name": "cifar10"}, "`cifar10` needs the key `path`"),
        ({"name": "cifar_10", "path": "x"}, "no data set `cifar_10`; did you mean `cifar10`?"),
        ({"name": "digits", "image_size": 32}, "`digits` takes no key `image_size`"),
        ({"name": "latents", "path": "x", "split": "train"}, "`latents` takes no key `split`"),
    ],
)
def test_keys_belong_to_their_data_set(keys: dict[str, object], message: str):
    from shd_diffusion.config import parse_config
    from shd_diffusion.data.prepare import PrepareConfig

    with pytest.raises(UserError) as error:
        parse_config({"data": keys, "prepare": {"vae": "v"}}, PrepareConfig, "c.yaml")
    key = "data.name" if "no data set" in message else "data"
    assert str(error.value).startswith(f"c.yaml: key `{key}`: {message}")
