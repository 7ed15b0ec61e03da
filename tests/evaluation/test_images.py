"""Sets of images from tensors, folders and .npz files, and what is wrong with those that are refused."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from shd_diffusion.data.folder import ImageFolder
from shd_diffusion.data.framing import square
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import images as images_module
from shd_diffusion.evaluation.images import (
    FolderImages,
    ImageSet,
    ResizedImages,
    open_image_files,
    tensor_images,
)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)


def write_folder(folder: Path, pixels: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    return folder


def stacked(images: ImageSet) -> torch.Tensor:
    return torch.stack([images[index] for index in range(len(images))])


def test_tensor_folder_and_npz_hold_the_same_images(pixels, tmp_path):
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    np.savez(tmp_path / "plain.npz", pixels)
    np.savez_compressed(tmp_path / "compressed.npz", pixels)
    sets = [
        tensor_images(expected, "tensor"),
        open_image_files(write_folder(tmp_path / "folder", pixels)),
        open_image_files(tmp_path / "plain.npz"),
        open_image_files(tmp_path / "compressed.npz"),
    ]
    for images in sets:
        assert torch.equal(stacked(images), expected)
    assert sets[0].sha256() == sets[2].sha256() == sets[3].sha256()


def test_an_uncompressed_npz_is_mapped_not_read(pixels, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=pixels, arr_1=np.arange(4))
    images = open_image_files(tmp_path / "images.npz")
    assert isinstance(images.array, np.memmap)
    assert images.labels.tolist() == [0, 1, 2, 3]


def test_grey_images_become_rgb_and_subfolders_classes(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        Image.new("L", (5, 4), color=77).save(tmp_path / name / "a.png")
    images = open_image_files(tmp_path)
    assert images[0].shape == (3, 4, 5) and images[0].unique().tolist() == [77]
    assert images.labels.tolist() == [0, 1]


def test_the_hash_is_of_the_content(pixels, tmp_path):
    before = FolderImages(write_folder(tmp_path / "a", pixels)).sha256()
    assert FolderImages(write_folder(tmp_path / "b", pixels)).sha256() == before
    pixels[2, 0, 0, 0] ^= 1
    assert FolderImages(write_folder(tmp_path / "a", pixels)).sha256() != before


def test_names_that_are_no_text_and_links_to_nowhere(pixels, tmp_path):
    folder = write_folder(tmp_path / "a", pixels)
    (folder / "000000.png").rename(folder / os.fsdecode(b"0\xff\n.png"))
    images = FolderImages(folder)
    assert images.name(3) == f"{folder}/0\\xff\\n.png" and len(images.sha256()) == 64
    (folder / "000001.png").unlink()
    (folder / "000001.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"000001\.png: not a readable image"):
        FolderImages(folder)[0]
    (folder / "000001.png").unlink()
    (folder / "000001.png").symlink_to("000001.png")
    with pytest.raises(UserError, match=r"000001\.png: not a readable image"):
        FolderImages(folder)[0]


def test_images_of_a_folder_are_decoded_as_in_training(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGBA", (8, 4), (9, 9, 9, 0)).save(tmp_path / "0.png", exif=exif)
    image = FolderImages(tmp_path)[0]
    assert image.shape == (3, 8, 4) and image.unique().tolist() == [255]


def test_resizing_keeps_the_centre(tmp_path):
    stripes = torch.zeros(1, 3, 8, 24, dtype=torch.uint8)
    stripes[..., 8:16] = 200  # the middle third
    small = ResizedImages(tensor_images(stripes, "stripes"), 4, "box")
    assert small[0].shape == (3, 4, 4) and small[0].unique().tolist() == [200]
    assert small.sha256() != ResizedImages(tensor_images(stripes, "stripes"), 4, "bicubic").sha256()


class Surprise:
    """What a pickle can do."""

    def __reduce__(self):
        return sys.exit, ("a pickle was run",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, r"has no images `arr_0` \(keys: images\)"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"`arr_0` is float64 \(2, 4, 4, 3\); images are uint8"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"`arr_0` is uint8 \(2, 3, 4, 4\)"),
        ({"arr_0": np.array([Surprise()], dtype=object)}, "not an .npz of plain arrays"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_something_else_is_refused(arrays, message, save, tmp_path):
    save(tmp_path / "images.npz", **arrays)
    with pytest.raises(UserError, match=message) as refused:
        open_image_files(tmp_path / "images.npz")
    assert str(tmp_path / "images.npz") in str(refused.value)


@pytest.mark.parametrize(
    "labels", [np.array(["cat", "dog", "cat", "cow"]), np.arange(3), np.eye(4, dtype=int), np.zeros(4)]
)
def test_labels_that_are_none_are_refused(labels, pixels, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=pixels, arr_1=labels)
    with pytest.raises(UserError, match=r"images\.npz: `arr_1` is .*; labels are integers \(4,\)"):
        open_image_files(tmp_path / "images.npz")


def npz_with(header: bytes, path: Path, data: bytes = b"", **member: int) -> Path:
    """An .npz whose only array has this header, as a dictionary's text."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo("arr_0.npy")
        info.compress_type = member.get("compress_type", zipfile.ZIP_DEFLATED)
        archive.writestr(info, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data)
    return path


@pytest.mark.parametrize("compress_type", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", ["(-2, 4, 4, 3)", "(2, 4, 4, 4)", "(1000000000000, 4, 4, 3)", "(2, 4", "5"])
def test_headers_that_lie_are_refused(shape, compress_type, tmp_path):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path = npz_with(header, tmp_path / "images.npz", bytes(2 * 4 * 4 * 3), compress_type=compress_type)
    with pytest.raises(UserError, match=r"images\.npz: not an \.npz of plain arrays") as refused:
        open_image_files(path)
    assert "\n" not in str(refused.value)


def test_an_encrypted_npz_and_one_that_unpacks_to_too_much_are_refused(pixels, monkeypatch, tmp_path):
    np.savez_compressed(tmp_path / "images.npz", pixels)
    content = bytearray((tmp_path / "images.npz").read_bytes())
    content[6] |= 1
    content[content.rindex(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "secret.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"secret\.npz: not an .npz of plain arrays .*encrypted"):
        open_image_files(tmp_path / "secret.npz")
    monkeypatch.setattr(images_module, "LARGEST_IN_MEMORY", pixels.size)
    with pytest.raises(UserError, match=r"`arr_0.npy` is too large to unpack"):
        open_image_files(tmp_path / "images.npz")
    np.savez(tmp_path / "images.npz", pixels)
    assert len(open_image_files(tmp_path / "images.npz")) == 4  # what is mapped may be of any size


def test_an_image_of_too_many_pixels_is_one_line(tmp_path, monkeypatch):
    Image.new("L", (30, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"bomb\.png: not a readable image \(Image size .* exceeds limit"):
        stacked(open_image_files(tmp_path))


def test_files_that_are_no_images_are_refused(pixels, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no image files here"):
        open_image_files(tmp_path / "empty")
    with pytest.raises(UserError, match=r"neither a folder of images nor an \.npz"):
        open_image_files(tmp_path / "missing")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=r"torn.npz: not an .npz"):
        open_image_files(tmp_path / "torn.npz")
    with pytest.raises(UserError, match=r"absent\.npz: cannot be read"):
        open_image_files(tmp_path / "absent.npz")
    folder = write_folder(tmp_path / "folder", pixels)
    torn = folder / "000002.png"
    torn.write_bytes(torn.read_bytes()[:60])
    with pytest.raises(UserError, match=r"000002\.png: not a readable image"):
        stacked(open_image_files(folder))


def test_a_tensor_of_another_type_is_refused():
    with pytest.raises(ValueError, match=r"uint8 \(N, 3, H, W\), not torch.float32 \(1, 3, 8, 8\)"):
        tensor_images(torch.zeros(1, 3, 8, 8), "images")


def test_a_folder_has_the_images_that_training_finds(tmp_path):
    """Of every kind, also behind a link."""
    elsewhere = tmp_path / "elsewhere"
    for place, kinds in (
        (tmp_path / "set" / "a", ("png", "webp", "bmp", "tif")),
        (elsewhere, ("jpg", "ppm")),
    ):
        place.mkdir(parents=True)
        for number, kind in enumerate(kinds):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(place / f"{number}.{kind}")
    (tmp_path / "set" / "b").symlink_to(elsewhere)
    found = FolderImages(tmp_path / "set")
    trained_on = ImageFolder(tmp_path / "set", square(8))
    assert [Path(found.name(i)) for i in range(len(found))] == sorted(map(Path, trained_on.paths))
    assert found.labels.tolist() == [0] * 4 + [1] * 2
