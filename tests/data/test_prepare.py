"""Latents: encoded once, whole, by any number of processes, and read back as the VAE would give them."""

from __future__ import annotations

import json
import shutil
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from forks import launch
from image_files import BROKEN, NUM_IMAGES, SIZE
from safetensors.torch import load_file, save_file

from shd_diffusion.data import DataConfig, build_source, datasets, open_dataset, reference_images
from shd_diffusion.data.decoding import UnreadFile
from shd_diffusion.data.folder import ImageFolder
from shd_diffusion.data.latent_space import LatentSpace
from shd_diffusion.data.latents import checksum, read_manifest
from shd_diffusion.data.prepare import EncodeConfig, PrepareConfig, encode_shard, write_manifest
from shd_diffusion.data.prepare import prepare as run_prepare
from shd_diffusion.errors import UserError


def make_config(images: Path, vae: Path, size: int = SIZE, **changes: object) -> PrepareConfig:
    settings = {"vae": str(vae), "batch_size": 2, "shard_size": 3, "max_corrupt_share": 0.1, **changes}
    data = DataConfig(name="image_folder", path=str(images), image_size=size)
    return PrepareConfig(data=data, prepare=EncodeConfig(**settings))


def make_cache(images: Path, vae: Path, output: Path, **changes: object) -> Path:
    run_prepare(make_config(images, vae, **changes), output, "prepare.yaml")
    return output


def latents(folder: Path, **changes: object) -> DataConfig:
    return DataConfig(name="latents", path=str(folder), **changes)


def shard_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "shards").iterdir())}


def clean_images(folder: Path) -> torch.Tensor:
    images = open_dataset(DataConfig(name="image_folder", path=str(folder), image_size=SIZE))
    return torch.stack([images[index]["image"] for index in range(len(images))]).float() / 127.5 - 1


def test_latents_are_those_of_direct_encoding(images: Path, vae: Path, tmp_path: Path):
    """By diffusers' own sampling of its own distribution, scaled as its pipelines do, from the same noise."""
    source = build_source(latents(make_cache(images, vae, tmp_path / "cache"), horizontal_flip=True))
    assert (len(source), source.num_classes, source.shape, source.needs_noise) == (
        NUM_IMAGES,
        2,
        (4, 8, 8),
        True,
    )
    model = AutoencoderKL.from_pretrained(vae)
    flipped = torch.arange(NUM_IMAGES) % 3 == 0
    pixels = clean_images(images)
    pixels[flipped] = pixels[flipped].flip(-1)
    with torch.no_grad():
        direct = model.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(7))
    noise = torch.randn(direct.shape, generator=torch.Generator().manual_seed(7))
    items = {"moments": torch.stack([source.dataset[index]["moments"] for index in range(NUM_IMAGES)])}
    expected = (direct - model.config.shift_factor) * model.config.scaling_factor
    torch.testing.assert_close(source.clean(items, flipped, noise), expected, atol=2e-6, rtol=1e-5)

    # Over many draws of noise: mean and deviation of the cached distribution.
    with torch.no_grad():
        moments = model.encode(clean_images(images)[:1]).latent_dist
    draws = torch.randn(4000, *source.shape, generator=torch.Generator().manual_seed(1))
    one = {"moments": items["moments"][:1].expand(4000, -1, -1, -1, -1)}
    many = source.clean(one, torch.zeros(4000, dtype=torch.bool), draws)
    many = many / model.config.scaling_factor + model.config.shift_factor
    assert ((many.mean(0) - moments.mean[0]).abs() < 5 * moments.std[0] / 4000**0.5).all()
    torch.testing.assert_close(many.std(0), moments.std[0], rtol=0.08, atol=0)


def test_without_flips_only_the_straight_moments_are_read(images: Path, vae: Path, tmp_path: Path):
    folder = make_cache(images, vae, tmp_path / "cache", dtype="float16")
    straight, both = build_source(latents(folder)), build_source(latents(folder, horizontal_flip=True))
    assert straight.dataset[4]["moments"].shape == (1, 8, 8, 8) and both.dataset[4]["moments"].shape == (
        2,
        8,
        8,
        8,
    )
    assert torch.equal(straight.dataset[4]["moments"], both.dataset[4]["moments"][:1])
    drawn = torch.ones(2, dtype=torch.bool)
    noise = torch.zeros(2, *straight.shape)
    items = torch.stack([both.dataset[index]["moments"] for index in range(2)])
    unflipped = straight.clean({"moments": items[:, :1]}, drawn, noise)
    assert not torch.equal(unflipped, both.clean({"moments": items}, drawn, noise))
    assert unflipped.dtype == torch.float32
    assert torch.equal(straight.first(2)[0], unflipped)


def test_workers_read_what_the_process_reads(images: Path, vae: Path, tmp_path: Path):
    folder = make_cache(images, vae, tmp_path / "cache")
    found = []
    for workers in (0, 2):
        source = build_source(latents(folder, num_workers=workers))
        source.first(2)  # opens a shard here, before the workers start
        found.append(list(source.batches([[3, 0], [13, 5, 7], [1]])))
    for alone, by_worker in zip(*found, strict=True):
        assert alone.keys() == by_worker.keys() == {"moments", "class_labels"}
        assert all(torch.equal(alone[name], by_worker[name]) for name in alone)


def test_what_prepare_left_out_is_known(
    images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make_cache(images, vae, tmp_path / "cache")
    monkeypatch.setattr(datasets, "find_unreadable", lambda _: pytest.fail("looked at all images again"))
    assert len(reference_images(latents(folder))) == NUM_IMAGES


def test_a_broken_image_is_left_out_named_and_counted(
    broken_images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = make_cache(broken_images, vae, tmp_path / "cache")
    report = (folder / "unreadable.txt").read_text().splitlines()
    assert len(report) == 1 and report[0].startswith(str(broken_images / "cat" / "05.png"))
    source = build_source(latents(folder))
    assert len(source) == NUM_IMAGES - 1
    assert [source.dataset[index]["class_labels"] for index in range(len(source))] == [0] * 9 + [1] * 4
    monkeypatch.setattr(datasets, "find_unreadable", lambda _: pytest.fail("looked at all images again"))
    reference = reference_images(latents(folder))
    names = [Path(reference.name(index)).name for index in range(len(reference))]
    assert names == [f"{index:02d}.png" for index in range(NUM_IMAGES) if index != BROKEN]
    assert reference.labels is not None and reference.labels.tolist() == [0] * 9 + [1] * 4


def test_too_many_broken_images_are_an_error(broken_images: Path, vae: Path, tmp_path: Path):
    output = tmp_path / "cache"
    with pytest.raises(UserError, match=r"1 of 14 images are unreadable.*prepare\.max_corrupt_share"):
        make_cache(broken_images, vae, output, max_corrupt_share=0.05)
    assert "05.png" in (output / "unreadable.txt").read_text()
    with pytest.raises(UserError, match="not complete"):
        build_source(latents(output))
    make_cache(
        broken_images, vae, output, max_corrupt_share=0.1
    )  # continues: the share is no part of a cache
    assert len(build_source(latents(output))) == NUM_IMAGES - 1


def test_an_interrupted_cache_is_continued(
    images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = shard_files(make_cache(images, vae, tmp_path / "whole"))
    assert len(whole) == 2 * 5
    output, encode = tmp_path / "cache", LatentSpace.encode
    calls = 0

    def interrupted(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:  # within the second shard
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(LatentSpace, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_cache(images, vae, output)
    assert sorted(shard_files(output)) == ["latents-00000.json", "latents-00000.safetensors"]
    with pytest.raises(UserError, match="not complete"):
        build_source(latents(output))

    (output / "shards" / ".latents-00001.safetensors.tmp-1").write_bytes(b"of a call that was killed")
    written = (output / "shards" / "latents-00000.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(LatentSpace, "encode", encode)
    make_cache(images, vae, output)
    assert (output / "shards" / "latents-00000.safetensors").stat().st_mtime_ns == written
    assert shard_files(output) == whole


def test_a_damaged_shard_is_named_and_written_anew(images: Path, vae: Path, tmp_path: Path):
    folder = make_cache(images, vae, tmp_path / "cache")
    whole = shard_files(folder)
    path = folder / "shards" / "latents-00002.safetensors"
    flipped = bytearray(whole[path.name])
    flipped[-100] ^= 1
    for content in (bytes(flipped), whole[path.name][:-8], None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=r"latents-00002\.safetensors: damaged .*prepare"):
            build_source(latents(folder))
        make_cache(images, vae, folder)
        assert shard_files(folder) == whole
    path.write_bytes(bytes(flipped))
    build_source(latents(folder, verify=False))  # of the right size: that is all that is looked at
    garbage = b"\xff" * len(flipped)
    path.write_bytes(garbage)
    with pytest.raises(UserError, match=r"latents-00002\.safetensors: damaged"):
        build_source(latents(folder, verify=False)).dataset[7]


def test_what_a_cache_is_made_from_must_not_change(images: Path, vae: Path, tmp_path: Path):
    folder = make_cache(images, vae, tmp_path / "cache")
    before = shard_files(folder)

    other = tmp_path / "other-vae"
    shutil.copytree(vae, other)
    began = build_source(latents(folder)).fingerprint()
    make_cache(images, other, folder)  # the same VAE elsewhere
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    make_cache(moved, vae, folder)
    assert build_source(latents(folder)).fingerprint() == began  # a run goes on with it
    assert reference_images(latents(folder)).source == f"image_folder {moved} {SIZE} px"
    here = make_config(images, vae).data
    assert reference_images(latents(folder), here).source == f"image_folder {images} {SIZE} px"
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.weight"][0, 0, 0, 0] += 1e-3
    save_file(weights, other / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"manifest\.json.*another VAE \(`prepare\.vae`\)"):
        make_cache(images, other, folder)
    with pytest.raises(UserError, match="another image size"):
        make_cache(images, vae, folder, size=24)
    with pytest.raises(UserError, match=r"another `prepare\.shard_size` \(3 there, 4 now\)"):
        make_cache(images, vae, folder, shard_size=4)
    changed = images / "cat" / "03.png"
    shutil.copy(images / "cat" / "04.png", changed)
    with pytest.raises(UserError, match=r"another images \(by `data`\)"):
        make_cache(images, vae, folder)
    changed.unlink()
    with pytest.raises(UserError, match=r"manifest\.json.*another images"):
        make_cache(images, vae, folder)
    assert shard_files(folder) == before

    with pytest.raises(UserError, match=r"lies in .*images, which is read \(`data\.path`\)"):
        make_cache(images, vae, images)
    with pytest.raises(UserError, match=r"prepare\.vae"):
        make_cache(images, tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_grey_images_get_three_channels(vae: Path, tmp_path: Path):
    config = PrepareConfig(
        data=DataConfig(name="digits"),
        prepare=EncodeConfig(vae=str(vae), shard_size=1000, batch_size=500),
    )
    run_prepare(config, tmp_path / "cache", "prepare.yaml")
    source = build_source(latents(tmp_path / "cache"))
    assert (len(source), source.shape, source.num_classes) == (1797, (4, 4, 4), 10)


TWO = """
import sys
from pathlib import Path
from accelerate import PartialState
from shd_diffusion.data.prepare import PrepareConfig
from shd_diffusion.data import DataConfig, build_source
from shd_diffusion.data.prepare import prepare
from shd_diffusion.errors import UserError
config = PrepareConfig.model_validate_json(sys.argv[1])
prepare(config, Path(sys.argv[2]), "prepare.yaml")
assert PartialState().num_processes == 2
latents = DataConfig(name="latents", path=sys.argv[2])
assert len(build_source(latents)) == 14
PartialState().wait_for_everyone()
if PartialState().is_main_process:
    shard = Path(sys.argv[2], "shards", "latents-00001.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
PartialState().wait_for_everyone()
try:
    build_source(latents)
    raise AssertionError("a damaged shard was taken")
except UserError as error:
    assert "latents-00001.safetensors: damaged" in str(error)
if PartialState().is_main_process:
    shard.write_bytes(whole)
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
"""


def test_two_processes_write_what_one_does(images: Path, vae: Path, tmp_path: Path):
    alone = make_cache(images, vae, tmp_path / "alone")
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch(2, script, make_config(images, vae).model_dump_json(), tmp_path / "together")
    assert shard_files(tmp_path / "together") == shard_files(alone)
    manifests = [
        json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("alone", "together")
    ]
    assert manifests[0] == manifests[1]


def bucket_cache(images: Path, vae: Path, output: Path) -> Path:
    """As `make_cache`, of two shapes, in shards of 3."""
    data = DataConfig(name="image_folder", path=str(images), image_size=SIZE, buckets=[[16, 32], [32, 16]])
    settings = EncodeConfig(vae=str(vae), batch_size=2, shard_size=3, max_corrupt_share=0.2)
    run_prepare(PrepareConfig(data=data, prepare=settings), output, "prepare.yaml")
    return output


def test_no_image_is_lost_where_buckets_are_planned_anew(
    images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A header that cannot be read for a moment moves all images behind it to other shards."""
    whole = shard_files(bucket_cache(images, vae, tmp_path / "whole"))
    read, encode = {name: getattr(ImageFolder, name) for name in ("geometry", "image")}, encode_shard
    calls = 0

    def stopped(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        encode(*arguments)

    def unread(self: ImageFolder, index: int, name: str) -> Any:
        if index == 0:
            raise UnreadFile("not for a moment")
        return read[name](self, index)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for name in read:
            patch.setattr(ImageFolder, name, partialmethod(unread, name=name))
        patch.setattr("shd_diffusion.data.prepare.encode_shard", stopped)
        bucket_cache(images, vae, tmp_path / "cache")
    assert shard_files(bucket_cache(images, vae, tmp_path / "cache")) == whole


def test_a_complete_cache_of_an_earlier_version_stays(images: Path, vae: Path, tmp_path: Path):
    """Its shards in buckets had the identity of the cache alone; what runs know it by must not change."""
    folder = bucket_cache(images, vae, tmp_path / "cache")
    manifest = read_manifest(folder)
    for record in manifest["shards"]:
        record["identity"] = checksum(manifest["identity"])
        (folder / record["file"]).with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    write_manifest(folder, {key: value for key, value in manifest.items() if key != "checksum"})
    before, known = shard_files(folder), build_source(latents(folder)).fingerprint()
    path = next((folder / "shards").glob("*.safetensors"))
    path.unlink()
    bucket_cache(images, vae, folder)
    assert shard_files(folder) == before and build_source(latents(folder)).fingerprint() == known


def test_an_image_that_could_not_be_read_for_a_moment_is_not_left_out(
    images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = shard_files(make_cache(images, vae, tmp_path / "whole"))
    read, encode = ImageFolder.image, LatentSpace.encode
    reads, calls, fails, stops = 0, 0, 1, 0

    def unread(self: ImageFolder, index: int) -> torch.Tensor:
        nonlocal reads
        reads += index == 1
        if index == 1 and reads <= fails:
            raise UnreadFile("not for a moment")
        return read(self, index)

    def stopped(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == stops:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(ImageFolder, "image", unread)
    monkeypatch.setattr(LatentSpace, "encode", stopped)
    assert shard_files(make_cache(images, vae, tmp_path / "one")) == whole  # by the same call

    reads, calls, stops = 0, 0, 7
    with pytest.raises(KeyboardInterrupt):
        make_cache(images, vae, tmp_path / "two")
    record = json.loads((tmp_path / "two" / "shards" / "latents-00000.json").read_text())
    assert record["unreadable"][0]["unread"]
    assert shard_files(make_cache(images, vae, tmp_path / "two")) == whole  # by the next one

    reads, fails, stops = 0, 99, 0
    folder = make_cache(images, vae, tmp_path / "three")
    known, fails = build_source(latents(folder)).fingerprint(), 0
    make_cache(images, vae, folder)  # a complete cache stays as runs know it
    assert build_source(latents(folder)).fingerprint() == known


def test_a_size_that_could_not_be_looked_up_ends_in_no_batch(
    images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The image would stand in a bucket of another size."""
    geometry = ImageFolder.geometry

    def unread(self: ImageFolder, index: int) -> Any:
        if index == 0:
            raise UnreadFile("not for a moment")
        return geometry(self, index)

    monkeypatch.setattr(ImageFolder, "geometry", unread)
    folder = bucket_cache(images, vae, tmp_path / "cache")
    assert "could not be read when its size was looked up" in (folder / "unreadable.txt").read_text()
    assert len(build_source(latents(folder))) == NUM_IMAGES - 1
