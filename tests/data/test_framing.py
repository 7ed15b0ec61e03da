"""Squares and aspect-ratio buckets: which part of an image is kept, and what is told of it."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from hypothesis import assume, given
from hypothesis import strategies as st
from image_files import NUM_IMAGES, SIZE
from PIL import ExifTags, Image, ImageFile, ImageOps

from shd_diffusion.config import DataConfig, parse_config
from shd_diffusion.data import build_source, open_dataset, reference_images
from shd_diffusion.data.decoding import UnreadableImage, decode, read_geometry
from shd_diffusion.data.digits import digits
from shd_diffusion.data.framing import Framing, Geometry, bucket_of, buckets_of, square
from shd_diffusion.data.prepare import PrepareConfig
from shd_diffusion.errors import UserError

BUCKETS = [(24, 8), (16, 12), (16, 16), (12, 16), (8, 24)]

# Podell et al. 2023, appendix I; by height, the taller half.
SDXL = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024,),
}


def test_buckets_are_those_of_sdxl_and_pixart():
    found = buckets_of(1024, 64)
    expected = {(short, long) for short, others in SDXL.items() for long in others}
    assert set(found) == expected | {(long, short) for short, long in expected}
    assert len(set(found)) == len(found) and found == sorted(found, key=lambda size: (-size[0], size[1]))
    for size, step, table in ((1024, 64, ASPECT_RATIO_1024_BIN), (2048, 128, ASPECT_RATIO_2048_BIN)):
        assert {(int(height), int(width)) for height, width in table.values()} <= set(buckets_of(size, step))
    assert buckets_of(64, 64) == [(64, 64)]


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), step=st.sampled_from([8, 16, 32, 64]))
def test_the_nearest_bucket_has_the_nearest_ratio(width: int, height: int, step: int):
    buckets = buckets_of(64, step)
    assert all(side % step == 0 for bucket in buckets for side in bucket)
    found = bucket_of(width, height, buckets)
    assert found in buckets

    def apart(bucket: tuple[int, int]) -> Fraction:
        ratio = Fraction(width * bucket[0], height * bucket[1])
        return max(ratio, 1 / ratio)

    assert float(apart(found)) == pytest.approx(float(min(map(apart, buckets))), rel=1e-12)
    turned = bucket_of(height, width, [(wide, tall) for tall, wide in buckets])
    assert apart(found) == apart((turned[1], turned[0]))


def test_of_equal_ratios_the_largest_is_taken():
    assert bucket_of(100, 100, [(8, 8), (16, 16), (12, 12)]) == (16, 16)


@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_a_geometry_covers_and_keeps_the_centre(width: int, height: int):
    found = Framing(16, BUCKETS).geometry(width, height)
    assert found.original_size == (height, width) and found.size == bucket_of(width, height, BUCKETS)
    tall, wide = found.size
    assume(height < 2 * tall or width < 2 * wide)  # larger images are halved first, which drops odd pixels
    scale = max(Fraction(tall, height), Fraction(wide, width))
    for offset, length, side in ((found.crop[0], height, tall), (found.crop[1], width, wide)):
        assert abs(offset - (length * scale - side) / 2) <= Fraction(3, 4)
    assert min(found.crop) == 0


def gradient(width: int, height: int) -> Image.Image:
    """Red grows with the column, green with the row, each by one level every pixel."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))


def as_file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("width", "height"), [(160, 64), (64, 160), (101, 100), (200, 60), (37, 41), (31, 250), (8, 8), (6, 17)]
)
@pytest.mark.parametrize("buckets", [BUCKETS, [(16, 16)]])
def test_pixels_come_from_where_the_geometry_says(width: int, height: int, buckets: list[tuple[int, int]]):
    file = as_file(gradient(width, height))
    framing = Framing(16, buckets)
    found, pixels = read_geometry(file, "x", framing), decode(file, "x", framing).float()
    assert pixels.shape == (3, *found.size)
    for channel, offset, side, length in (
        (0, found.crop[1], found.size[1], width),
        (1, found.crop[0], found.size[0], height),
    ):
        errors = []
        least = side + 2 * offset
        for resized in (least, least + 1):  # as much is cut away on the other side, or one pixel more
            expected = (torch.arange(side) + offset + 0.5) * (length / resized) - 0.5
            expected = expected.view(1, -1) if channel == 0 else expected.view(-1, 1)
            difference = (pixels[channel] - expected)[1:-1, 1:-1]  # at the edges the gradient ends
            errors.append(difference.abs().max() * resized / length)
        # in pixels of the result: half a pixel, and half a level of rounding
        assert min(errors) <= 0.5 + 0.5 * least / length


def test_small_images_are_resized_and_cropped_as_pillow_does_it():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (15, 26, 3), dtype=np.uint8))
    expected = np.array(image.resize((21, 12), Image.Resampling.BICUBIC))[:, 2:18]
    file = as_file(image)
    framing = Framing(16, [(12, 16)])
    assert np.array_equal(decode(file, "x", framing).permute(1, 2, 0).numpy(), expected)
    assert read_geometry(file, "x", framing) == Geometry((15, 26), (0, 2), (12, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind: str, orientation: int):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    file = as_file(gradient(60, 25), kind, exif=exif, **options)
    stored, framing = Image.open(io.BytesIO(file)), Framing(16, BUCKETS)
    upright = ImageOps.exif_transpose(stored)
    found = read_geometry(file, "x", framing)
    assert found == framing.geometry(*upright.size)
    assert found.original_size == ((60, 25) if orientation > 4 else (25, 60))
    assert torch.equal(
        decode(file, "x", framing), decode(as_file(upright.convert("RGB")), "x", Framing(16, BUCKETS))
    )
    if kind != "TIFF":  # which Pillow turns in any case
        as_stored = Framing(16, BUCKETS, upright=False)
        assert read_geometry(file, "x", as_stored).original_size == (25, 60)
        assert torch.equal(
            decode(file, "x", as_stored), decode(as_file(stored.convert("RGB")), "x", as_stored)
        )


def test_a_damaged_tag_takes_no_image_away():
    file = as_file(gradient(60, 25), "JPEG", exif=b"Exif\0\0no tags at all")
    framing = Framing(16, BUCKETS)
    assert read_geometry(file, "x", framing).original_size == (25, 60)
    assert decode(file, "x", framing).shape == (3, 8, 24)


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "1", "CMYK"])
def test_palette_grey_and_other_modes(mode: str):
    image = gradient(60, 25)
    image = image.convert(mode)
    file = as_file(image, "JPEG" if mode == "CMYK" else "PNG")
    pixels = decode(file, "x", Framing(16, BUCKETS))
    assert (pixels.shape, pixels.dtype) == ((3, 8, 24), torch.uint8)
    assert read_geometry(file, "x", Framing(16, BUCKETS)) == Framing(16, BUCKETS).geometry(60, 25)
    with Image.open(io.BytesIO(file)) as stored:
        assert torch.equal(pixels, decode(as_file(stored.convert("RGB")), "x", Framing(16, BUCKETS)))


def test_a_geometry_decodes_no_pixels(monkeypatch: pytest.MonkeyPatch):
    files = {kind: as_file(gradient(60, 25), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")}
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for kind, file in files.items():
        found = read_geometry(file, kind, Framing(16, BUCKETS))
        assert found.original_size == (25, 60)
    with pytest.raises(UnreadableImage, match="x: not a readable image"):
        read_geometry(files["PNG"][:20], "x", Framing(16, BUCKETS))
    assert read_geometry(files["PNG"][:60], "x", Framing(16, BUCKETS)).size == (8, 24)


# --- data sets ---------------------------------------------------------------------------------------------------


def config_of(images: Path, **changes: Any) -> DataConfig:
    return DataConfig(name="image_folder", path=str(images), image_size=SIZE, **changes)


def test_a_data_set_in_buckets(images: Path):
    found = open_dataset(config_of(images, buckets=4))
    assert list(found.buckets) == buckets_of(SIZE, 4) and len(found.buckets) > 3
    shapes = set()
    for index in range(NUM_IMAGES):
        with Image.open(found.name(index)) as image:
            width, height = image.size
        geometry = found.geometry(index)
        assert geometry.original_size == (height, width)
        assert geometry.size == bucket_of(width, height, found.buckets)
        assert found[index]["image"].shape == (3, *geometry.size)
        shapes.add(geometry.size)
    assert len(shapes) > 3 and found.shape == (3, SIZE, SIZE)
    listed = open_dataset(config_of(images, buckets=[[8, 24], [24, 8]]))
    assert {listed.geometry(index).size for index in range(NUM_IMAGES)} == {(8, 24), (24, 8)}


def test_a_data_set_of_squares_has_one_bucket(images: Path):
    found = open_dataset(config_of(images))
    assert list(found.buckets) == [(SIZE, SIZE)]
    assert found.geometry(0) == square(SIZE).geometry(20, 70) == Geometry((70, 20), (20, 0), (SIZE, SIZE))
    assert list(digits().buckets) == [(8, 8)] and digits().geometry(3) == Geometry((8, 8), (0, 0), (8, 8))


def test_images_are_turned_unless_they_are_to_be_as_stored(tmp_path: Path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    gradient(60, 25).save(tmp_path / "a.png", exif=exif)
    turned, stored = (open_dataset(config_of(tmp_path, upright=upright)) for upright in (True, False))
    assert turned.geometry(0).original_size == (60, 25)
    assert stored.geometry(0).original_size == (25, 60)


def test_a_fingerprint_follows_the_buckets(images: Path):
    found = [
        open_dataset(config_of(images, buckets=b)).fingerprint() for b in (None, 4, 8, [[16, 16], [8, 32]])
    ]
    assert len(set(found)) == 4
    assert open_dataset(config_of(images, buckets=4)).fingerprint() == found[1]


def test_images_of_several_sizes_are_for_prepare(images: Path):
    with pytest.raises(UserError, match=r"data\.buckets: .*`shd-diffusion prepare`"):
        build_source(config_of(images, buckets=4))
    reference = reference_images(config_of(images, buckets=4))
    assert torch.equal(reference[2], reference_images(config_of(images))[2])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"buckets": 5}, "`image_size` is 16, which is no multiple of `buckets`, 5"),
        ({"buckets": 0}, "0: give the step of their sides, or a list of [height, width]"),
        ({"buckets": []}, "[]: give the step"),
        ({"buckets": [[8, 24], [8]]}, "[[8, 24], [8]]: give the step"),
        ({"buckets": [[8, -24]]}, "[[8, -24]]: give the step"),
        ({"buckets": "64"}, "is '64'"),
        ({"name": "cifar10", "image_size": None, "buckets": 8}, "`cifar10` takes no key `buckets`"),
    ],
)
def test_buckets_that_are_none(keys: dict[str, Any], message: str):
    tree = {"data": {"name": "image_folder", "path": "x", "image_size": 16, **keys}, "prepare": {"vae": "v"}}
    with pytest.raises(UserError) as error:
        parse_config(tree, PrepareConfig, "c.yaml")
    assert str(error.value).startswith("c.yaml: key `data") and message in str(error.value)
    assert "\n" not in str(error.value)
