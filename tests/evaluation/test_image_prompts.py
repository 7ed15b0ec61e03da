"""The prompts of images: beside them in a folder, or of a run's samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.image_prompts import image_prompts
from shd_diffusion.evaluation.images import FolderImages


def _images(folder: Path, *names: str) -> FolderImages:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return FolderImages(folder)


def _prompts(images: FolderImages) -> list[str] | None:
    return image_prompts(images.folder, images.paths)


def test_a_folder_without_prompts_has_none(tmp_path: Path) -> None:
    images = _images(tmp_path, "a.png")
    assert _prompts(images) is None
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "width": 4}\n')
    assert _prompts(images) is None


@pytest.mark.parametrize("key", ["text", "prompt"])
def test_metadata_name_the_files(key: str, tmp_path: Path) -> None:
    images = _images(tmp_path, "b.png", "a/c.jpg")
    lines = [{"file_name": "b.png", key: "a bee "}, {"file_name": "a/c.jpg", key: "the sea"}]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [path.name for path in images.paths] == ["c.jpg", "b.png"]
    assert _prompts(images) == ["the sea", "a bee"]


def test_metadata_lie_in_sub_folders_too_and_the_first_line_of_an_image_counts(tmp_path: Path) -> None:
    images = _images(tmp_path, "b.png", "a/c.jpg")
    lines = ["./b.png", "b.png"], ["c.jpg"]
    for folder, names in zip((tmp_path, tmp_path / "a"), lines, strict=True):
        entries = [{"file_name": name, "text": f"{name} {place}"} for place, name in enumerate(names)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert _prompts(images) == ["c.jpg 0", "./b.png 0"]


def test_a_text_file_beside_each_image_has_its_prompt(tmp_path: Path) -> None:
    images = _images(tmp_path, "0.png", "1.png")
    (tmp_path / "0.txt").write_text("zero\nanother caption\n")
    (tmp_path / "1.txt").write_text("one")
    assert _prompts(images) == ["zero", "one"]


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("0.txt", "zero", r"1\.png: has no prompt in 1\.txt, but other"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": "zero"}', r"1\.png: has no prompt in metadata\.jsonl"),
        ("metadata.jsonl", '{"file_name": "0.png", "text": 0}', r"metadata\.jsonl: line 1 needs a `file_name` and a"),
        ("metadata.jsonl", "0.png zero", r"metadata\.jsonl: line 1 is no JSON object"),
    ],
)  # fmt: skip
def test_prompts_of_some_images_only_are_an_error(file: str, text: str, says: str, tmp_path: Path) -> None:
    images = _images(tmp_path, "0.png", "1.png")
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=says) as refused:
        _prompts(images)
    assert "\n" not in str(refused.value)
