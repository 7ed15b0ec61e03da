"""Pictures that cannot be read, where nobody has looked through them before; and what a stage says that it has read."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch
from image_files import BROKEN, NUM_IMAGES, SIZE, write_images
from PIL import Image

from shd_diffusion.data import DataConfig, ImageSource, build_source, open_dataset, reference_images
from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.digits import digits
from shd_diffusion.data.tell import describe_images
from shd_diffusion.data.unreadable import MOST_CORRUPT, check_corrupt
from shd_diffusion.errors import UserError


def config_of(folder: Path, **keys: object) -> DataConfig:
    return DataConfig(name="image_folder", path=str(folder), image_size=SIZE, **keys)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_one_stands_in(broken_images: Path, workers: int, capsys: pytest.CaptureFixture) -> None:
    source = build_source(config_of(broken_images, num_workers=workers))
    assert isinstance(source, ImageSource) and len(source) == NUM_IMAGES
    capsys.readouterr()
    (batch, *_) = source.batches([[BROKEN, 0], [BROKEN + 1, BROKEN]])
    assert torch.equal(batch["image"][0], source.dataset.image(BROKEN + 1))
    assert torch.equal(source.item(BROKEN, 3)["image"], batch["image"][0])
    told = capsys.readouterr().err
    assert told.count("05.png: not a readable image") == 1 and "left out" in told


def test_more_than_a_few_are_an_error(broken_images: Path) -> None:
    (broken_images / "dog" / "12.png").write_bytes(b"no image")
    source = build_source(config_of(broken_images))
    with pytest.raises(
        UserError, match=r"12\.png: not a readable image.*with 1 others of 14 images.*remove them"
    ):
        list(source.batches([[BROKEN], [12]]))
    with pytest.raises(UserError, match="with 1 others of 14 images"):
        reference_images(config_of(broken_images))
    many = int(2 / MOST_CORRUPT)
    check_corrupt({0: "a", 1: "b"}, many)
    with pytest.raises(UnreadableImage):
        check_corrupt({0: "a", 1: "b", 2: "c"}, many)


def test_a_small_picture_is_refused(images: Path) -> None:
    Image.new("RGB", (2, 2)).save(images / "cat" / "small.png")
    source = build_source(config_of(images, least_size=SIZE))
    with pytest.raises(UserError, match=r"small\.png: is 2×2, .*; remove it, or train on what"):
        list(source.batches([list(range(NUM_IMAGES + 1))]))


def test_metrics_are_taken_without_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole, broken = write_images(tmp_path / "a", broken=False), write_images(tmp_path / "b", broken=True)
    found = reference_images(config_of(broken))
    assert len(found) == len(found.labels) == NUM_IMAGES - 1
    assert "05.png" not in {Path(found.name(i)).name for i in range(len(found))}
    assert torch.equal(found[BROKEN], reference_images(config_of(whole))[BROKEN + 1])
    assert capsys.readouterr().err.count("left out") == 1
    reference_images(config_of(broken))
    assert "left out" not in capsys.readouterr().err  # known by now


def test_a_file_that_could_not_be_read_is_tried_again(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGB", (SIZE, SIZE)).save(images / "cat" / "one_more.png")  # looked through by no other test
    opened = Image.open

    def stale(file: Path) -> Image.Image:
        if Path(file).name == "05.png":
            raise OSError(errno.ESTALE, "Stale file handle")
        return opened(file)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", stale)
        assert len(reference_images(config_of(images))) == NUM_IMAGES
    assert "Stale file handle): left out" in capsys.readouterr().err
    assert len(reference_images(config_of(images))) == NUM_IMAGES + 1


def test_what_was_read(images: Path) -> None:
    Image.new("RGB", (SIZE // 2, SIZE)).save(images / "dog" / "small.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 50)).save(images / "dog" / "turned.jpg", exif=exif)
    (images / "dog" / "none.png").write_bytes(b"no image")
    text = describe_images(open_dataset(config_of(images)))
    assert text.startswith("17 images, 2 classes: cat, dog; 1 enlarged, 1 turned, 1 unreadable; ")
    plain = describe_images(open_dataset(config_of(images, upright=False, least_size=SIZE)))
    assert plain == "17 images, 2 classes: cat, dog; 1 too small, 1 unreadable"
    shutil.rmtree(images / "dog")
    assert describe_images(open_dataset(config_of(images / "cat"))) == "10 images"
    assert describe_images(digits()) == "1,797 images, 10 classes"
