"""What each image of a folder was to show: from `metadata.jsonl`, or a text file beside each image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shd_diffusion.errors import UserError
from shd_diffusion.sampling.prompts import read_json_lines, read_lines

METADATA = "metadata.jsonl"
KEYS = ("text", "prompt")


def image_prompts(folder: Path, paths: Sequence[Path]) -> list[str] | None:
    """The prompts of images, in their order; None where the folder says nothing of prompts.

    A `metadata.jsonl`, as the library `datasets` has it, holds a line an image with its `file_name`, relative to the
    folder of the file, and its `text` or `prompt`; of several lines of an image the first counts. Without any
    the first line of the `.txt` beside an image is its prompt.

    Raises:
        UserError: some images have a prompt and others none, or a file is damaged.
    """
    beside = {
        parent for path in paths for parent in path.parents if parent == folder or folder in parent.parents
    }
    files = [file for parent in sorted(beside) if (file := parent / METADATA).exists()]
    found = _of_metadata(files) if files else _of_text_files(paths)
    if not found:
        return None
    for path in paths:
        if not found.get(path, "").strip():
            where = METADATA if files else path.with_suffix(".txt").name
            raise UserError(
                f"{path}: has no prompt in {where}, but other images here have one; write it there"
            )
    return [found[path].strip() for path in paths]


def _of_metadata(files: Sequence[Path]) -> dict[Path, str]:
    found: dict[Path, str] = {}
    for file in files:
        for number, line in enumerate(read_json_lines(file), start=1):
            key = next((key for key in KEYS if key in line), None)
            if key is None:  # the file may be of something else
                continue
            if not isinstance(line.get("file_name"), str) or not isinstance(line[key], str):
                raise UserError(
                    f"{file}: line {number} needs a `file_name` and a `{key}` that are texts; write them so"
                )
            found.setdefault(file.parent / os.path.normpath(line["file_name"]), line[key])
    return found


def _of_text_files(paths: Sequence[Path]) -> dict[Path, str]:
    beside = ((path, path.with_suffix(".txt")) for path in paths)
    return {path: read_lines(file)[0] for path, file in beside if file.exists()}
