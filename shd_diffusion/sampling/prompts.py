"""Prompts from files: a text file, JSON lines, or a folder with a text file a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shd_diffusion.data.captions import check_characters
from shd_diffusion.errors import UserError
from shd_diffusion.shipped import find_config


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as a file gives it.

    Attributes:
        text: without white space around it, and never empty.
        id: the stem of its file in a folder; else its number, from 0, in five digits.
        metadata: the other keys of its line, in JSON lines.
    """

    text: str
    id: str
    metadata: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file or folder, in UTF-8.

    Args:
        path: a text file with one prompt a line; a `.jsonl` with a `prompt` in every line, such as GenEval's
            `evaluation_metadata.jsonl`; or a folder with a `.txt` a prompt, such as DPG-Bench's, by their names.

    Raises:
        UserError: it is missing, empty or no such file, or a prompt is blank.
    """
    path = find_config(path)
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise UserError(f"{path}: no .txt files in this folder; give one with a .txt file a prompt")
        return [Prompt(_checked(read_utf8(file), str(file)), file.stem) for file in files]
    if path.suffix == ".jsonl":
        found = [
            (content.pop("prompt", None), content, f"{path}: line {number}")
            for number, content in enumerate(read_json_lines(path), start=1)
        ]
    else:
        found = [
            (line, {}, f"{path}: line {number}") for number, line in enumerate(read_lines(path), start=1)
        ]
    return [
        Prompt(_checked(text, place), f"{index:05d}", metadata)
        for index, (text, metadata, place) in enumerate(found)
    ]


def read_utf8(path: Path) -> str:
    """The text of a file, with line feeds as line ends.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")  # editors of Windows write a byte order mark
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not in UTF-8; save it in that encoding") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of prompts") from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, one or more.

    Raises:
        UserError: it is empty, cannot be read, or is not UTF-8.
    """
    # not str.splitlines, which splits at characters that stand within a prompt
    lines = read_utf8(path).removesuffix("\n").split("\n")
    if lines == [""]:
        raise UserError(f"{path}: is empty; write one entry a line")
    return lines


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line.

    Raises:
        UserError: as `read_lines`; or a line is no JSON object.
    """
    objects = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{path}: line {number} is no JSON object; write one a line")
        objects.append(content)
    return objects


def _checked(text: Any, place: str) -> str:
    """A prompt without white space around it.

    Raises:
        UserError: it is none, or blank.
    """
    if text is None:
        raise UserError(f"{place} has no key `prompt`; add it")
    if not isinstance(text, str):
        raise UserError(f"{place}: its prompt is {text!r}, not a text; write it in quotes")
    if not text.strip():
        raise UserError(f"{place} is blank; write a prompt there, or remove it")
    check_characters(text, place)
    return text.strip()
