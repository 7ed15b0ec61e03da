"""Captions: where they are read from, and what is said of those that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import NUM_IMAGES, SIZE
from PIL import Image

from shd_diffusion.config import DataConfig, dump_config, parse_config, parse_yaml
from shd_diffusion.data import build_source, open_dataset, reference_images
from shd_diffusion.data.captions import captions_of, captions_of_text
from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.digits import digits
from shd_diffusion.data.image_sets import Images
from shd_diffusion.data.prepare import PrepareConfig
from shd_diffusion.errors import UserError


def folder_of(path: Path, caption_column: str | None = "text") -> Images:
    return open_dataset(
        DataConfig(name="image_folder", path=str(path), image_size=SIZE, caption_column=caption_column)
    )


def table_of(path: Path, **keys: Any) -> Images:
    return open_dataset(
        DataConfig(
            name="huggingface", path=str(path), image_size=SIZE, **{"caption_column": "caption", **keys}
        )
    )


def write_lines(path: Path, *entries: Any) -> None:
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))


def names_below(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.png"))]


def write_metadata(folder: Path, captions: Callable[[int], Any] = lambda index: f"picture {index}") -> None:
    write_lines(
        folder / "metadata.jsonl",
        *(
            {"file_name": name, "text": captions(index), "other": index}
            for index, name in enumerate(names_below(folder))
        ),
    )


@pytest.fixture
def write_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a data set of three images with further columns."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(name: str = "table", **columns: list[Any]) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        pictures = [Image.fromarray(np.full((4, 5, 3), 9 * index, np.uint8)) for index in range(3)]
        features = {"image": datasets.Image()}
        table = datasets.Dataset.from_dict({"image": pictures}).cast(datasets.Features(features))
        for column, values in columns.items():
            table = table.add_column(column, values)
        table.to_parquet(folder / "train-00000-of-00001.parquet")
        return folder

    return write


def refused(call: Callable[[], Any], *parts: str) -> None:
    """See that something is refused in one line that holds all parts."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for part in ("data.caption_column: ", *parts):
        assert part in message, message


# --- folders -----------------------------------------------------------------------------------------------------


def test_metadata_gives_the_captions_that_the_datasets_library_reads(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names = names_below(images)
    write_lines(
        images / "metadata.jsonl",
        *({"file_name": name, "text": f"ein Bild, Nr. {name}: é\u2028"} for name in reversed(names)),
    )
    expected = {
        Path(row["image"]["path"]).name: row["text"]
        for row in datasets.load_dataset("imagefolder", data_dir=str(images), split="train").cast_column(
            "image", datasets.Image(decode=False)
        )
    }
    found = folder_of(images)
    assert len(found) == NUM_IMAGES == len(expected)
    for index in range(len(found)):
        assert found.captions(index) == [expected[Path(found.name(index)).name]]
    assert found.labels is None and found.num_classes is None and found.condition(0) == {}
    assert torch.equal(found.image(4), folder_of(images, None).image(4))


def test_metadata_of_sub_folders_and_several_captions(images: Path):
    for kind in ("cat", "dog"):
        write_lines(
            images / kind / "metadata.jsonl",
            *({"file_name": n, "text": [f"a {kind}", n]} for n in names_below(images / kind)),
            "",
            {"file_name": f"./{names_below(images / kind)[0]}", "text": "once more"},
        )
    found = folder_of(images)
    assert found.captions(0) == ["a cat", "00.png", "once more"]
    assert found.captions(13) == ["a dog", "13.png"]


def test_a_text_beside_each_image_one_caption_a_line(images: Path, monkeypatch: pytest.MonkeyPatch):
    for path in sorted(images.rglob("*.png")):
        path.with_suffix(".txt").write_bytes(f"\ufeffé {path.stem}\r\n\r\n  second \n".encode())
    found = folder_of(images, "txt")
    assert [found.captions(index) for index in (0, 12)] == [["é 00", "second"], ["é 12", "second"]]
    monkeypatch.chdir(images)  # paths without a folder before them
    assert folder_of(Path(), "txt").captions(3) == ["é 03", "second"]
    write_metadata(Path())
    assert folder_of(Path()).captions(3) == ["picture 3"]


def test_a_folder_without_the_key_is_as_before(images: Path):
    write_metadata(images)
    found = folder_of(images, None)
    assert found.captions(0) == [] and found.num_classes == 2


@pytest.mark.parametrize("kind", ["metadata", "txt"])
def test_a_fingerprint_follows_the_captions(images: Path, kind: str):
    def write(captions: Callable[[int], str]) -> str:
        if kind == "metadata":
            write_metadata(images, captions)
            return folder_of(images).fingerprint()
        for index, name in enumerate(names_below(images)):
            (images / name).with_suffix(".txt").write_text(captions(index))
        return folder_of(images, "txt").fingerprint()

    without = folder_of(images, None).fingerprint()
    before = write(str)
    assert write(str) == before != without
    assert write(lambda index: str(index if index != 7 else 8)) != before
    assert folder_of(images, None).fingerprint() == without


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{not json", ["metadata.jsonl, line 3: not JSON"]),
        ("[1, 2]", ["metadata.jsonl, line 3 has no `file_name`"]),
        ({"text": "a"}, ["metadata.jsonl, line 3 has no `file_name`", "add it"]),
        ({"file_name": 4, "text": "a"}, ["line 3 has no `file_name`"]),
        ({"file_name": "cat/99.png", "text": "a"}, ["line 3 names cat/99.png", "no such image"]),
        ({"file_name": "../images/cat/00.png", "text": "a"}, ["line 3 names ../images", "no such image"]),
        ({"file_name": "cat/00.png", "txet": "a"}, ["line 3 has no key `text`", "did you mean `txet`?"]),
        ({"file_name": "cat/00.png", "text": 5}, ["line 3: key `text` is 5", "a list of strings"]),
        ({"file_name": "cat/00.png", "text": None}, ["line 3: key `text` is None"]),
        ({"file_name": "cat/00.png", "text": " "}, ["line 3: key `text` is ' '", "write a caption there"]),
        ({"file_name": "cat/00.png", "text": []}, ["line 3: key `text` is an empty list"]),
        ({"file_name": "cat/00.png", "text": ["a", 3.5]}, ["line 3: key `text` is 3.5"]),
    ],
)
def test_metadata_that_is_none(images: Path, line: Any, parts: list[str]):
    first = {"file_name": "cat/00.png", "text": "a"}
    write_lines(images / "metadata.jsonl", first, first, line, "{")
    refused(lambda: folder_of(images), f"{images}/", *parts)


def test_captions_that_are_missing(images: Path):
    refused(lambda: folder_of(images), f"{images}/metadata.jsonl is missing", "`txt`")
    write_metadata(images)
    (images / "dog" / "99.png").write_bytes(b"")
    refused(lambda: folder_of(images), f"{images}/dog/99.png has no line in metadata.jsonl", "add one")
    refused(lambda: folder_of(images, "txt"), f"{images}/cat/00.txt: cannot be read (No such file", "00.png")
    (images / "cat" / "00.txt").write_text(" \n\n")
    refused(lambda: folder_of(images, "txt"), f"{images}/cat/00.txt holds no text")
    (images / "cat" / "00.txt").write_bytes(b"\xff\xfe")
    refused(lambda: folder_of(images, "txt"), f"{images}/cat/00.txt: not a text in UTF-8")
    (images / "metadata.jsonl").write_bytes(b"\xff\xfe")
    refused(lambda: folder_of(images), f"{images}/metadata.jsonl: cannot be read")


# --- tables ------------------------------------------------------------------------------------------------------


def test_a_column_of_captions(write_table: Callable[..., Path]):
    path = write_table(caption=["one", "two", "three"], many=[["a"], ["b", "c"], ["d"]], label=[0, 1, 1])
    found = table_of(path)
    assert [found.captions(index) for index in range(3)] == [["one"], ["two"], ["three"]]
    assert found.labels is None and found.condition(0) == {} and len(build_source_of(path)) == 3
    both = table_of(path, caption_column="many", label_column="label")
    assert both.captions(1) == ["b", "c"] and both.labels.tolist() == [0, 1, 1]
    assert torch.equal(both.image(2), found.image(2))
    labelled = table_of(path, caption_column=None)
    assert labelled.captions(0) == [] and labelled.labels.tolist() == [0, 1, 1]
    bare = table_of(path, caption_column=None, label_column=None)
    assert bare.captions(0) == [] and bare.labels is None
    assert len({one.fingerprint() for one in (found, both, labelled, bare)}) == 4


def build_source_of(path: Path) -> Any:
    return build_source(
        DataConfig(name="huggingface", path=str(path), image_size=SIZE, caption_column="caption")
    )


def test_a_config_reads_back_whether_labels_are_read():
    keys = {"name": "huggingface", "path": "x", "image_size": 8}
    for more, expected in (({}, "label"), ({"caption_column": "c"}, None)):
        tree = {"data": keys | more, "prepare": {"vae": "v"}}
        config = parse_config(tree, PrepareConfig, "c.yaml")
        assert config.data.label_column == expected
        assert parse_config(parse_yaml(dump_config(config)), PrepareConfig, "c.yaml") == config


def test_a_fingerprint_follows_the_column(write_table: Callable[..., Path]):
    path = write_table(caption=["one", "two", "three"])
    before = table_of(path).fingerprint()
    assert table_of(path).fingerprint() == before
    write_table(caption=["one", "two", "four"])
    assert table_of(path).fingerprint() != before


def test_a_copy_of_a_data_set_is_the_same(write_table: Callable[..., Path], tmp_path: Path):
    path = write_table(caption=["one", "two", "three"])
    before = table_of(path).fingerprint()
    copied = Path(shutil.copytree(path if path.is_dir() else path.parent, tmp_path / "moved"))
    assert table_of(copied if path.is_dir() else copied / path.name).fingerprint() == before


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ([1, 2, 3], ["column `caption` is 1; give a string"]),
        (["a", None, "b"], ["image 1 of split train: column `caption` is None"]),
        (["a", "b", "\t"], ["image 2 of split train: column `caption` is '\\t'; write a caption"]),
        ([["a"], [], ["b"]], ["image 1 of split train: column `caption` is an empty list"]),
        ([["a"], ["b", ""], ["b"]], ["image 1 of split train: column `caption` is ''"]),
        ([{"en": "a"}] * 3, ["column `caption` is {'en': 'a'}; give a string"]),
    ],
)
def test_columns_that_hold_no_captions(write_table: Callable[..., Path], values: list[Any], parts: list[str]):
    path = write_table(caption=values)
    refused(lambda: table_of(path), str(path), *parts)


def test_a_column_that_is_missing(write_table: Callable[..., Path]):
    path = write_table(caption=["a"] * 3)
    refused(lambda: table_of(path, caption_column="captoin"), "no column `captoin`", "mean `caption`?")
    refused(lambda: table_of(path, caption_column="image"), "column `image` is <PIL")


# --- data sets without captions ----------------------------------------------------------------------------------


def test_other_data_sets_have_none():
    assert digits().captions(5) == []


@pytest.mark.parametrize(
    "keys",
    [{"name": "digits"}, {"name": "cifar10", "path": "x"}, {"name": "fashion_mnist"}, {"name": "latents"}],
)
def test_data_sets_that_take_no_captions(keys: dict[str, Any]):
    keys = {"path": "x"} | keys if keys["name"] == "latents" else keys
    with pytest.raises(UserError) as error:
        parse_config(
            {"data": {**keys, "caption_column": "text"}, "prepare": {"vae": "v"}}, PrepareConfig, "c"
        )
    assert str(error.value) == f"c: key `data`: `{keys['name']}` takes no key `caption_column`; remove it"


# --- prompts without images --------------------------------------------------------------------------------------


def prompts_of(path: Path, **keys: Any) -> DataConfig:
    return DataConfig(name="prompts", path=str(path), image_size=SIZE, **keys)


def test_prompts_of_a_text_file(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red heart\r\n\r\n  ein Käse, gelb \na cat".encode())
    found = open_dataset(prompts_of(path))
    assert [found.captions(index) for index in range(len(found))] == [
        ["a red heart"],
        ["ein Käse, gelb"],
        ["a cat"],
    ]
    assert found.name(1) == f"{path}: prompt 1" and found.condition(0) == {} and found.labels is None
    assert found.shape == (3, SIZE, SIZE)
    assert (found.geometry(2).original_size, found.geometry(2).crop) == ((SIZE, SIZE), (0, 0))
    before = found.fingerprint()
    assert open_dataset(prompts_of(path)).fingerprint() == before
    path.write_bytes("a red heart\nein Käse, gelb\na cat\n".encode())
    assert open_dataset(prompts_of(path)).fingerprint() == before
    path.write_text("a red heart\nein Kaese, gelb\na cat\n")
    assert open_dataset(prompts_of(path)).fingerprint() != before


def test_prompts_of_a_column(write_table: Callable[..., Path], tmp_path: Path):
    path = write_table(caption=["one", "two", "three"], many=[["a"], ["b", "c"], ["d"]])
    found = open_dataset(prompts_of(path, caption_column="many"))
    assert len(found) == 3 and found.captions(1) == ["b", "c"]
    assert found.fingerprint() != open_dataset(prompts_of(path, caption_column="caption")).fingerprint()
    folder = path if path.is_dir() else path.parent
    copied = shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copyfile)  # of another time
    again = prompts_of(copied if path.is_dir() else copied / path.name, caption_column="many")
    assert open_dataset(again).fingerprint() == found.fingerprint()
    refused(lambda: open_dataset(prompts_of(path, caption_column="mane")), "did you mean `many`?")


def test_prompts_have_no_images(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n")
    config = prompts_of(path)
    for ask in (
        lambda: open_dataset(config)[0],
        lambda: build_source(config),
        lambda: reference_images(config),
    ):
        with pytest.raises(UserError) as error:
            ask()
        assert str(error.value).startswith(f"data.name: `prompts` ({path}) has no images; ")
        assert not isinstance(error.value, UnreadableImage)  # which `prepare` would leave out


def test_prompts_that_are_none(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    with pytest.raises(UserError, match=r"data\.path: .*prompts\.txt: cannot be read \(No such file"):
        open_dataset(prompts_of(path))
    with pytest.raises(UserError, match=r"data\.path: .*cannot be read \(Is a directory\).*caption_column"):
        open_dataset(prompts_of(tmp_path))
    path.write_text("\n \n")
    with pytest.raises(UserError, match=r"^data\.path: .*prompts\.txt holds no text"):
        open_dataset(prompts_of(path))


def test_a_caption_holds_what_only_looks_like_the_end_of_a_line() -> None:
    text = "a cat\u2028on a mat\r\n\n a dog\x0chere \r\x85x"
    assert captions_of_text(text.encode(), "a.txt") == ["a cat\u2028on a mat", "a dog\x0chere", "x"]
    with pytest.raises(UserError, match=r"line 3: its character 5 is half of one .*; mend it"):
        captions_of(["a", "cat \ud83d"], "line 3")
