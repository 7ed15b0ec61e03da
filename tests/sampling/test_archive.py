"""Samples as one .npz, read by NumPy and by our own evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import FEW_IMAGES, command, sets
from PIL import Image

from shd_diffusion.errors import UserError
from shd_diffusion.sampling.archive import write_archive


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of 6×4."""
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index:06d}.png")
    (tmp_path / "sampling.json").write_text(json.dumps({"num_images": 3, "labels": [4, 0, 9]}))
    return tmp_path


def test_numpy_reads_images_and_labels(folder: Path) -> None:
    with np.load(write_archive(folder), allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
        assert arrays.files == ["arr_0", "arr_1"]
    assert images.dtype == np.uint8 and images.shape == (3, 4, 6, 3) and labels.tolist() == [4, 0, 9]
    for index, image in enumerate(images):
        expected = np.random.default_rng(index).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        np.testing.assert_array_equal(image, expected)


def test_the_same_images_make_the_same_file(folder: Path) -> None:
    first = write_archive(folder).read_bytes()
    assert write_archive(folder).read_bytes() == first


def test_a_damaged_image_leaves_no_archive(folder: Path) -> None:
    torn = folder / "000001.png"
    torn.write_bytes(torn.read_bytes()[:60])
    with pytest.raises(UserError, match=r"000001\.png: missing or damaged"):
        write_archive(folder)
    torn.unlink()
    with pytest.raises(UserError, match=r"000001\.png: missing or damaged"):
        write_archive(folder)
    assert not list(folder.glob("*npz*"))


def test_samples_without_labels_have_no_labels_there(folder: Path) -> None:
    (folder / "sampling.json").write_text(json.dumps({"num_images": 2, "labels": None}))
    with np.load(write_archive(folder), allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"] and len(arrays["arr_0"]) == 2
    (folder / "sampling.json").unlink()
    with pytest.raises(UserError, match="has no finished samples"):
        write_archive(folder)


def test_the_evaluation_of_the_archive_is_that_of_the_images(run: Path) -> None:
    assert command("sample", run, *sets(*FEW_IMAGES), "--npz")[0] == 0
    options = [
        "--reference",
        "digits",
        "--extractor",
        "digits-classifier",
        "--metrics",
        "fid,kid,prc,accuracy",
    ]
    found = [
        json.loads(command("evaluate", images, *options)[1])
        for images in (run / "samples", run / "samples" / "samples.npz")
    ]
    assert found[0] == found[1] and "label_accuracy" in found[0]
    assert found[0]["protocol"]["num_inference_steps"] == 3
