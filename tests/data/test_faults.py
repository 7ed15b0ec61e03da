"""What is wrong with the files of a user is said in one line that names them."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import NUM_IMAGES, SIZE
from PIL import Image
from safetensors.torch import load_file, save_file
from test_latent_space import dc
from test_prepare import latents, make_cache, make_config
from test_published import write_idx

from shd_diffusion.data import DataConfig, build_source, datasets
from shd_diffusion.data import latents as cached
from shd_diffusion.data.decoding import UnreadableImage, decode
from shd_diffusion.data.folder import ImageFolder
from shd_diffusion.data.framing import Framing, square
from shd_diffusion.data.image_sets import Images
from shd_diffusion.data.latent_space import LatentSpace
from shd_diffusion.data.prepare import prepare
from shd_diffusion.data.published import fashion_mnist
from shd_diffusion.errors import UserError
from shd_diffusion.files import locked, save_tensors


def test_reading_draws_nothing_from_torch(images: Path):
    source = build_source(DataConfig(name="image_folder", path=str(images), image_size=SIZE))
    before = torch.get_rng_state()
    next(source.batches([[0, 1]]))
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_are_readable_as_the_umask_says(tmp_path: Path):
    old = os.umask(0o027)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


# --- folders -----------------------------------------------------------------------------------------------------


def test_a_flat_folder_is_unconditional(images: Path, vae: Path, tmp_path: Path):
    config = DataConfig(name="image_folder", path=str(images / "cat"), image_size=SIZE)
    source = build_source(config)
    assert (len(source), source.num_classes, source.condition_names, source.example()) == (10, None, [], {})
    assert source.first(2)[1] == {} and datasets.reference_images(config).labels is None
    make = make_config(images / "cat", vae)
    prepare(make, tmp_path / "cache", "prepare.yaml")
    source = build_source(latents(tmp_path / "cache"))
    assert (len(source), source.num_classes, source.example()) == (10, None, {})


def test_links_in_a_circle_are_refused(images: Path):
    (images / "dog" / "again").symlink_to(images)
    with pytest.raises(UserError, match="dog/again: links to a folder that it lies in"):
        ImageFolder(images, square(SIZE))
    (images / "dog" / "again").unlink()
    (images / "mouse").symlink_to(images)
    with pytest.raises(UserError, match="mouse: links"):
        ImageFolder(images, square(SIZE))
    (images / "mouse").unlink()
    (images / "mouse").symlink_to(images / "cat")  # a class may lie elsewhere
    assert ImageFolder(images, square(SIZE)).labels.bincount().tolist() == [10, 4, 10]


def test_names_and_links_of_any_kind_can_be_prepared(images: Path, vae: Path, tmp_path: Path):
    (images / "cat" / "00.png").rename(os.fsdecode(os.fsencode(images / "cat") + b"/00\xff\n.png"))
    (images / "cat" / "50.png").symlink_to(tmp_path / "nowhere.png")
    (images / "cat" / "51.png").symlink_to(images / "cat" / "51.png")
    (images / "cat" / "52\n\udcff.png").write_bytes(b"no image")
    folder = make_cache(images, vae, tmp_path / "cache", max_corrupt_share=0.2)
    report = (folder / "unreadable.txt").read_text().splitlines()
    assert len(report) == 3 and report[2].startswith(f"{images}/cat/52\\n\\xff.png: not a readable image")
    assert len(build_source(latents(folder))) == NUM_IMAGES


# --- Fashion-MNIST -----------------------------------------------------------------------------------------------


def write_fashion(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    write_idx(folder / "train-images-idx3-ubyte.gz", images)
    write_idx(folder / "train-labels-idx1-ubyte.gz", labels)


def test_fashion_mnist_that_is_none(tmp_path: Path):
    write_fashion(tmp_path, np.zeros((2, 28, 28), np.uint8), np.array([3, 99], np.uint8))
    with pytest.raises(UserError, match=r"labels-idx1-ubyte\.gz is damaged \(a label of 99"):
        fashion_mnist(tmp_path, "train")
    write_fashion(tmp_path, np.zeros((0, 28, 28), np.uint8), np.zeros(0, np.uint8))
    with pytest.raises(UserError, match=r"images-idx3-ubyte\.gz is damaged \(.*0 items"):
        fashion_mnist(tmp_path, "train")
    header = gzip.decompress((tmp_path / "train-images-idx3-ubyte.gz").read_bytes())
    bomb = header[:4] + (2**31).to_bytes(4) + header[8:] + bytes(2**27)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bomb))
    with pytest.raises(UserError, match=f"{2**31} items"):
        fashion_mnist(tmp_path, "train")


# --- caches ------------------------------------------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage", ["cut off", "list", "no checksums", "scaling", "count", "shape", "no vae"])
def test_a_damaged_manifest_is_refused_and_mended(images: Path, vae: Path, tmp_path: Path, damage: str):
    folder = make_cache(images, vae, tmp_path / "cache", shard_size=14)
    path = folder / "manifest.json"
    whole = path.read_text()
    manifest = json.loads(whole)
    match damage:
        case "cut off":
            path.write_text(whole[: len(whole) // 2])
        case "list":
            path.write_text("[]")
        case "no checksums":
            edit(path, shards=[{"images": 14}])
        case "scaling":
            edit(path, vae={**manifest["vae"], "scaling": {"shift": [0.0], "scale": [99.0]}})
        case "count":
            edit(path, shards=[{**manifest["shards"][0], "images": -200}])
        case "shape":
            edit(path, shape=[4, 8])
        case "no vae":
            edit(path, vae=None)
    with pytest.raises(UserError, match=r"manifest\.json.*delete it and run"):
        build_source(latents(folder))
    with pytest.raises(UserError, match=r"manifest\.json.*delete it and run"):
        make_cache(images, vae, folder, shard_size=14)
    path.unlink()
    written = (folder / "shards" / "latents-00000.safetensors").stat().st_mtime_ns
    make_cache(images, vae, folder, shard_size=14)  # as the message says; nothing is encoded again
    assert path.read_text() == whole
    assert (folder / "shards" / "latents-00000.safetensors").stat().st_mtime_ns == written


def test_shards_of_another_cache_are_written_anew(images: Path, vae: Path, tmp_path: Path):
    folder = make_cache(images, vae, tmp_path / "cache", dtype="float16")
    (folder / "manifest.json").unlink()
    make_cache(images, vae, folder)
    assert build_source(latents(folder)).dataset[0]["moments"].dtype == torch.float32


def test_another_vae_than_that_of_the_latents_is_refused(images: Path, vae: Path, tmp_path: Path):
    other = tmp_path / "vae"
    shutil.copytree(vae, other)
    source = build_source(latents(make_cache(images, other, tmp_path / "cache")))
    source.load_vae()
    edit(other / "config.json", scaling_factor=99.0)
    with pytest.raises(UserError, match="not the VAE that encoded these latents"):
        source.load_vae()
    shutil.copy(vae / "config.json", other)
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    weights["decoder.conv_in.bias"] += 1
    save_file(weights, other / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="not the VAE that encoded these latents"):
        source.load_vae()


def test_latents_that_are_not_finite_are_named(images: Path, vae: Path, tmp_path: Path, monkeypatch):
    encode, calls = LatentSpace.encode, []

    def overflowing(self: LatentSpace, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(pixels)
        moments = encode(self, pixels)
        return (
            torch.where(torch.arange(len(moments)).view(-1, 1, 1, 1) == 1, 1e30, moments)
            if len(calls) == 3
            else moments
        )

    monkeypatch.setattr(LatentSpace, "encode", overflowing)
    with pytest.raises(UserError, match=r"cat/03\.png: its latents are not finite in float16"):
        make_cache(images, vae, tmp_path / "cache", dtype="float16", shard_size=10)


def test_a_vae_without_all_its_numbers_is_refused(images: Path, vae: Path, tmp_path: Path):
    other = tmp_path / "vae"
    shutil.copytree(vae, other)
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.bias"][0] = torch.nan
    save_file(weights, other / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"prepare\.vae.*weights are not finite: encoder\.conv_in\.bias"):
        make_cache(images, other, tmp_path / "cache")
    del weights["encoder.conv_in.bias"]
    save_file(weights, other / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"prepare\.vae.*weights are missing: encoder\.conv_in\.bias"):
        make_cache(images, other, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_two_preparations_do_not_share_a_folder(images: Path, vae: Path, tmp_path: Path):
    with locked(tmp_path / "cache"), pytest.raises(UserError, match="another command is at work"):
        make_cache(images, vae, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(build_source(latents(make_cache(images, vae, tmp_path / "cache")))) == NUM_IMAGES


def test_one_process_a_machine_reads_the_shards(images: Path, vae: Path, tmp_path: Path, monkeypatch):
    folder = make_cache(images, vae, tmp_path / "cache")

    class Second:
        is_local_main_process = False

    read = []
    monkeypatch.setattr(cached, "processes", Second)
    monkeypatch.setattr(cached, "sha256", read.append)
    build_source(latents(folder))
    assert read == []
    monkeypatch.setattr(cached, "gather_object", lambda found: ["the first process's error", *found])
    with pytest.raises(UserError, match="the first process's error"):
        build_source(latents(folder))


class Captioned(Images):
    """Grey images with made-up prompt embeddings, (3, 5), and masks."""

    shape = (1, SIZE, SIZE)
    null = {"encoder_hidden_states": torch.zeros(1, 3, 5), "encoder_attention_mask": torch.ones(1, 3).bool()}  # noqa: RUF012

    def __len__(self) -> int:
        return 4

    def image(self, index: int) -> torch.Tensor:
        return torch.full(self.shape, 60 * index, dtype=torch.uint8)

    def condition(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "encoder_hidden_states": torch.full((3, 5), float(index)),
            "encoder_attention_mask": torch.arange(3) <= index,
        }

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return "captioned"


def test_any_condition_goes_through_a_cache(images: Path, vae: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "captioned", datasets.DataSet(lambda config: Captioned()))
    config = make_config(images, vae)
    config = config.model_copy(update={"data": DataConfig(name="captioned")})
    prepare(config, tmp_path / "cache", "prepare.yaml")
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["conditions"] == ["encoder_attention_mask", "encoder_hidden_states"]
    source = build_source(latents(tmp_path / "cache"))
    assert source.num_classes is None and source.null.keys() == Captioned.null.keys()
    assert all(torch.equal(source.null[name], value) for name, value in Captioned.null.items())
    (batch,) = source.batches([[3, 0, 1]])
    found = source.condition(batch)
    assert found["encoder_hidden_states"][:, 0, 0].tolist() == [3, 0, 1]
    assert found["encoder_attention_mask"].sum(1).tolist() == [3, 1, 2]
    assert source.example()["encoder_hidden_states"].shape == (1, 3, 5)


def test_a_vae_without_a_distribution_is_cached_too(images: Path, tmp_path: Path):
    torch.manual_seed(0)
    dc().save_pretrained(tmp_path / "vae")
    source = build_source(latents(make_cache(images, tmp_path / "vae", tmp_path / "cache")))
    assert not source.needs_noise and source.dataset[0]["moments"].shape == (1, *source.shape)
    clean, _ = source.first(2)
    space = LatentSpace(source.load_vae())
    pixels = build_source(DataConfig(name="image_folder", path=str(images), image_size=SIZE)).first(2)[0]
    torch.testing.assert_close(clean, space.normalise(space.encode(pixels)), rtol=1e-5, atol=1e-6)


# --- what pictures say -------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 255, 256).round().astype(np.uint8)


def as_png(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "levels"),
    [
        ("png", RAMP),
        ("png", RAMP.astype(np.uint16) * 257),
        ("tiff", RAMP.astype(np.uint16) * 257),
        ("tiff", RAMP.astype(np.float32) / 255),
    ],
    ids=["8 bits", "16 bits", "16 bits of TIFF", "floats"],
)
def test_levels_are_read_by_their_depth(kind: str, levels: np.ndarray):
    decoded = decode(as_png(Image.fromarray(levels.reshape(16, 16)), kind), "x")
    assert torch.equal(decoded, torch.from_numpy(RAMP.reshape(16, 16)).expand(3, 16, 16))


@pytest.mark.parametrize(
    "levels",
    [
        np.full((4, 4), 70_000, np.int32),
        np.full((4, 4), 1.5, np.float32),
        np.full((4, 4), np.nan, np.float32),
    ],
)
def test_levels_without_a_known_white_are_refused(levels: np.ndarray):
    with pytest.raises(UnreadableImage, match=r"^x: not a readable image .*levels"):
        decode(as_png(Image.fromarray(levels), "tiff"), "x")


def test_transparent_pixels_show_the_background():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 255))
    image.paste((0, 200, 0, 0), (0, 0, 8, 4))  # green, that nobody is to see
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 200, 0, 200, 0, 0])
    palette.paste(0, (0, 0, 8, 4))
    for file in (as_png(image), as_png(palette, transparency=0), as_png(image, "webp", lossless=True)):
        for background, colour in (("white", 255), ("black", 0)):
            found = decode(file, "x", Framing(8, [(8, 8)], background=background))
            assert (found[:, :4] == colour).all() and found[:, 5, 0].tolist() == [200, 0, 0]
        assert torch.equal(decode(file, "x"), decode(file, "x", square(8)))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert decode(as_png(half), "x").unique().item() in (126, 127)


def test_enlarged_images_are_told_and_small_ones_can_be_refused(
    images: Path, vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    Image.new("RGB", (SIZE // 2, SIZE // 2)).save(images / "cat" / "small.png")
    config = DataConfig(name="image_folder", path=str(images), image_size=SIZE)
    build_source(config)
    told = capsys.readouterr().err
    assert f"{NUM_IMAGES + 1} images, 2 classes: cat, dog; 1 enlarged; `data.least_size` leaves" in told
    bounded = config.model_copy(update={"least_size": SIZE - 1})
    with pytest.raises(
        UnreadableImage, match=r"small\.png: is \d+×\d+, below the \d+ pixels of `data\.least_size`"
    ):
        list(datasets.open_dataset(bounded))
    make = make_config(images, vae)
    make = make.model_copy(update={"data": make.data.model_copy(update={"least_size": SIZE - 1})})
    prepare(make, tmp_path / "cache", "prepare.yaml")
    assert "small.png" in (tmp_path / "cache" / "unreadable.txt").read_text()
    assert len(build_source(latents(tmp_path / "cache"))) == NUM_IMAGES


def test_what_decoding_depends_on_is_part_of_the_fingerprint(images: Path):
    def fingerprint(**keys: Any) -> str:
        config = DataConfig(name="image_folder", path=str(images), image_size=SIZE, **keys)
        return datasets.open_dataset(config).fingerprint()

    assert len({fingerprint(), fingerprint(upright=False), fingerprint(background="black")}) == 3


def test_the_order_of_classes_that_are_numbers_is_told(images: Path, capsys: pytest.CaptureFixture):
    for name in ("cat", "dog"):
        (images / name).rename(images / {"cat": "10", "dog": "9"}[name])
    ImageFolder(images, square(SIZE))
    assert "order of their names as texts (10, 9, ...)" in capsys.readouterr().err
    (images / "9").rename(images / "09")
    ImageFolder(images, square(SIZE))
    assert not capsys.readouterr().err


def test_images_beside_class_folders_are_told(images: Path, capsys: pytest.CaptureFixture):
    for name in ("a.png", "b.png"):
        shutil.copyfile(images / "cat" / "00.png", images / name)
    assert len(ImageFolder(images, square(SIZE))) == NUM_IMAGES
    assert "2 images beside the class folders have no class and are left out" in capsys.readouterr().err


@pytest.mark.parametrize("background", ["wite", "#12", "", "#11223344"])
def test_a_background_is_a_colour(background: str):
    with pytest.raises(ValueError, match="give a colour"):
        DataConfig(name="image_folder", path="x", image_size=8, background=background)
