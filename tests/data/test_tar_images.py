"""WebDataset shards, read by index."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_prepare import make_config

from shd_diffusion.config import DataConfig
from shd_diffusion.data import build_source, open_dataset, tar_images, tar_index
from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.image_sets import Images
from shd_diffusion.data.prepare import prepare
from shd_diffusion.errors import UserError

webdataset = pytest.importorskip("webdataset")

SIZE = 16
Members = list[tuple[str, bytes]]


@pytest.fixture(autouse=True)
def _kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))


def picture(index: int, kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(index)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def sample(index: int, extension: str = "png") -> Members:
    kind = {"jpg": "JPEG", "jpeg": "JPEG"}.get(extension, extension.upper())
    note = json.dumps({"caption": f"note {index}", "all": [f"a {index}", f"b {index}"], "width": 30})
    return [
        (f"{index:03d}.{extension}", picture(index, kind)),
        (f"{index:03d}.txt", f"picture {index}\n".encode()),
        (f"{index:03d}.json", note.encode()),
    ]


def write_tar(path: Path, members: Members, mode: str = "w") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 4, 1 and 3 images, as the library writes them; every kind of image."""
    extensions = ["png", "jpg", "jpeg", "webp"]
    index = 0
    for number, count in enumerate((4, 1, 3)):
        path = tmp_path / "shards" / f"part-{number:03d}.tar"
        path.parent.mkdir(exist_ok=True)
        with webdataset.TarWriter(str(path)) as writer:
            for _ in range(count):
                members = {
                    name.partition(".")[2]: content for name, content in sample(index, extensions[index % 4])
                }
                writer.write({"__key__": f"{index:03d}", **members})
                index += 1
    return path.parent


def config_of(pattern: Any, caption_column: str | None = "txt", **keys: Any) -> DataConfig:
    return DataConfig(
        name="webdataset", path=str(pattern), image_size=SIZE, caption_column=caption_column, **keys
    )


def shards_of(pattern: Any, caption_column: str | None = "txt", **keys: Any) -> Images:
    return open_dataset(config_of(pattern, caption_column, **keys))


@pytest.mark.parametrize("pattern", ["part-{000..002}.tar", "*.tar", "part-{000..001}.tar::{0}/part-002.tar"])
def test_images_and_captions_are_those_that_the_library_reads(folder: Path, pattern: str):
    found = shards_of(f"{folder}/{pattern.replace('{0}', str(folder))}")
    paths = [str(path) for path in sorted(folder.iterdir())]
    expected = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert len(found) == len(expected) == 8
    for index in [7, 0, 4, 3, 5]:  # in any order
        one = expected[index]
        content = next(one[extension] for extension in ("png", "jpg", "jpeg", "webp") if extension in one)
        assert found.file(index) == content
        assert found.captions(index) == [one["txt"].decode().strip()]
        assert found.name(index).startswith(f"{one['__url__']}: {one['__key__']}.")
        assert found[index].keys() == {"image"} and found[index]["image"].shape == (3, SIZE, SIZE)
    assert found.labels is None and len(build_source(config_of(f"{folder}/*.tar"))) == 8
    with pytest.raises(IndexError):
        found.name(8)


def test_captions_of_a_json_key_or_none(folder: Path):
    assert shards_of(f"{folder}/*.tar", "json.caption").captions(5) == ["note 5"]
    assert shards_of(f"{folder}/*.tar", "json.all").captions(5) == ["a 5", "b 5"]
    without = shards_of(f"{folder}/*.tar", None)
    assert without.captions(5) == [] and len(without) == 8
    bucketed = shards_of(f"{folder}/*.tar", None, buckets=4)
    assert bucketed.geometry(5).original_size == (25, 30)
    assert bucketed[5]["image"].shape[1:] == bucketed.geometry(5).size


def test_samples_are_grouped_as_the_library_does_it(tmp_path: Path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("__meta__.json", b"{}"),
            ("readme", b"no sample"),
            ("notes.txt", b"of no image"),
            ("sub/a.b.txt", b"not the one"),
            ("sub/a.PNG", picture(1)),
            ("sub/a.txt", b"first\n\nsecond\n"),
            ("x/a.png", picture(2)),
            ("x/a.mask.png", picture(3)),
            ("x/a.txt", b"another folder"),
        ],
    )
    found = shards_of(path)
    assert [found.captions(index) for index in range(len(found))] == [["first", "second"], ["another folder"]]
    assert found.file(1) == picture(2)


def test_a_shard_is_read_through_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = shards_of(f"{folder}/*.tar")
    read: list[Path] = []

    def counting(shard: Path, column: str | None, original: Callable[..., Any] = tar_index.read_index) -> Any:
        read.append(shard)
        return original(shard, column)

    monkeypatch.setattr(tar_index, "read_index", counting)
    again = shards_of(f"{folder}/*.tar")
    assert read == [] and again.fingerprint() == first.fingerprint()
    assert [again.captions(i) for i in range(8)] == [first.captions(i) for i in range(8)]
    assert torch.equal(again.image(6), first.image(6))

    write_tar(folder / "part-001.tar", sample(40))  # another one in its place
    changed = shards_of(f"{folder}/*.tar")
    assert read == [folder / "part-001.tar"] and changed.captions(4) == ["picture 40"]
    assert changed.fingerprint() != first.fingerprint()

    kept = sorted((tmp_path / "kept" / "shd-diffusion" / "shards").iterdir())
    for path in kept:
        path.write_bytes(b"damaged")
    assert shards_of(f"{folder}/*.tar").captions(4) == ["picture 40"] and len(read) == 4


def test_processes_share_the_reading(folder: Path, monkeypatch: pytest.MonkeyPatch):
    orders = []
    monkeypatch.setattr(tar_images, "index_of", lambda shard, column: orders[-1].append(shard.name) or [0])
    for index in range(3):
        orders.append([])
        state = type("State", (), {"process_index": index, "num_processes": 3, "is_main_process": index == 0})
        monkeypatch.setattr(tar_images, "processes", state)
        shards_of(f"{folder}/*.tar")
    assert [order[0][5:8] for order in orders] == ["000", "001", "002"]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


def test_only_what_is_asked_for_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    found = shards_of(f"{folder}/*.tar")
    opened = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a: opened.append(self.name) or original(self, *a))
    found[5], found.captions(0), found.name(0)
    assert opened == ["part-002.tar"]


def test_a_copy_of_shards_is_the_same(folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copyfile)  # with times of its own
    found = [shards_of(f"{path}/*.tar").fingerprint() for path in (folder, tmp_path / "copied")]
    assert found[0] == found[1]


def test_a_fingerprint_follows_the_captions(folder: Path):
    found = [shards_of(f"{folder}/*.tar", column).fingerprint() for column in (None, "txt", "json.caption")]
    assert len(set(found)) == 3
    assert shards_of(f"{folder}/*.tar").fingerprint() == found[1]


def test_a_damaged_image_is_left_out_by_prepare(folder: Path, vae: Path, tmp_path: Path):
    write_tar(folder / "part-001.tar", [("040.png", picture(40)[:200]), ("040.txt", b"cut in half")])
    found = shards_of(f"{folder}/*.tar")
    assert found.captions(4) == ["cut in half"] and found.image(5).shape == (3, SIZE, SIZE)
    with pytest.raises(UnreadableImage, match=r"part-001\.tar: 040\.png: not a readable image"):
        found.image(4)
    config = make_config(folder, vae, max_corrupt_share=0.2)
    cache = tmp_path / "cache"
    prepare(config.model_copy(update={"data": config_of(f"{folder}/*.tar", None)}), cache, "prepare.yaml")
    assert "part-001.tar: 040.png" in (cache / "unreadable.txt").read_text()
    assert len(build_source(DataConfig(name="latents", path=str(cache)))) == 7
    (folder / "part-002.tar").unlink()
    with pytest.raises(UnreadableImage, match=r"part-002\.tar: 005\.jpg: cannot be read \(No such file"):
        found.image(5)


# --- what is none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "column", "parts"),
    [
        (sample(0)[:1], "txt", ["a.tar: 000.png has no member `txt` beside it", "known here: png"]),
        (sample(0), "text", ["a.tar: 000.png has no member `text`", "did you mean `txt`?"]),
        (sample(0) + sample(1)[:1], "txt", ["a.tar: 001.png has no member `txt`"]),
        (sample(0), "json.captoin", ["a.tar: 000.json has no key `captoin`", "did you mean `caption`?"]),
        (sample(0), "json.width", ["a.tar: 000.json: key `width` is 30; give a string"]),
        (sample(0), "json", ["`json` names no key", "json.KEY"]),
        ([*sample(0)[:1], ("000.json", b"{")], "json.caption", ["a.tar: 000.json: not JSON"]),
        ([*sample(0)[:1], ("000.json", b"[]")], "json.caption", ["a.tar: 000.json: not an object"]),
        ([*sample(0)[:1], ("000.txt", b" \n")], "txt", ["a.tar: 000.txt holds no text"]),
        ([*sample(0)[:1], ("000.txt", b"\xff")], "txt", ["a.tar: 000.txt: not a text in UTF-8"]),
    ],
)
def test_captions_that_are_none(tmp_path: Path, members: Members, column: str, parts: list[str]):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(UserError) as error:
        shards_of(path, column)
    message = str(error.value)
    assert message.startswith("data.caption_column: ") and "\n" not in message
    assert all(part in message for part in parts), message
    assert not (tmp_path / "kept").exists()


def test_shards_that_are_none(folder: Path, tmp_path: Path):
    whole = write_tar(tmp_path / "cut.tar", sample(0)).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:800])  # within the first image
    (tmp_path / "text.tar").write_text("no tar " * 200)
    (tmp_path / "empty.tar").write_bytes(b"")
    write_tar(tmp_path / "a.tar.gz", sample(0), "w:gz")
    write_tar(tmp_path / "twice.tar", sample(0) + sample(0)[:1])
    write_tar(tmp_path / "none.tar", sample(0)[1:])
    for pattern, message in (
        (tmp_path / "nowhere-{0..3}.tar", r"nowhere-0\.tar: no such file; .*on disk"),
        (tmp_path / "nowhere-*.tar", r"nowhere-\*\.tar: no such file"),
        ("https://example.org/a-{0..3}.tar", r"https://example\.org/a-0\.tar: no such file; .*on disk"),
        (tmp_path / "{a", r"not a pattern of shards .*shard-\{000\.\.123\}\.tar"),
        (tmp_path / "cut.tar", r"cut\.tar: no tar file .*unexpected end of data.*get it again"),
        (tmp_path / "text.tar", r"text\.tar: no tar file"),
        (tmp_path / "empty.tar", r"empty\.tar: no tar file .*empty file"),
        (tmp_path / "a.tar.gz", r"a\.tar\.gz: no tar file .*uncompressed"),
        (tmp_path / "twice.tar", r"twice\.tar: no tar file .*000\.png: duplicate file name"),
        (tmp_path / "none.tar", r"none\.tar: no images in these shards \(jpg, jpeg, png, webp\)"),
        (folder, r"shards: no tar file .*Is a directory"),
    ):
        with pytest.raises(UserError, match=rf"^data\.path: .*{message}") as error:
            shards_of(pattern)
        assert "\n" not in str(error.value)


def test_an_index_that_cannot_be_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written .*XDG_CACHE_HOME"):
        shards_of(f"{folder}/*.tar")


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(UserError, match=r"shd-diffusion\[webdataset\]"):
        shards_of("a.tar")
