"""Captions of a folder of images: in files `metadata.jsonl`, or in a .txt beside each image."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from shd_diffusion.data.captions import KEY, captions_of_key, captions_of_text
from shd_diffusion.errors import UserError, one_line, printable_path

METADATA, BESIDE = "metadata.jsonl", "txt"


def captions_from_metadata(
    folder: Path, images: Sequence[str], metadata: Iterable[str], key: str
) -> list[list[str]]:
    """Captions of all images from files `metadata.jsonl`, as the `datasets` library has them.

    A line is an object with a `file_name`, relative to the folder that the file lies in, and further keys. Several
    lines of an image are several captions.

    Args:
        folder: that of the data set, for messages.
        images: their paths.
        metadata: paths of the files.
        key: that of the captions.

    Raises:
        UserError: there is no such file, a line is damaged or names no image, or an image has no caption.
    """
    found: dict[str, list[str]] = {image: [] for image in images}
    files = sorted(metadata)
    if not files:
        raise UserError(
            f"{KEY}: {printable_path(folder / METADATA)} is missing; write it, a line an image, "
            f"or give `{BESIDE}` for a .txt beside each image"
        )
    for file in files:
        for number, line in enumerate(_lines(file), start=1):
            where = f"{printable_path(file)}, line {number}"
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise UserError(f"{KEY}: {where}: not JSON ({one_line(error)}); mend it") from None
            name = entry.get("file_name") if isinstance(entry, dict) else None
            if not isinstance(name, str):
                raise UserError(f"{KEY}: {where} has no `file_name`, the name of an image beside it; add it")
            image = f"{file.removesuffix(METADATA)}{os.path.normpath(name)}"  # as images are listed
            captions = found.get(image)
            if captions is None:
                raise UserError(
                    f"{KEY}: {where} names {printable_path(name)}, but there is no such image; "
                    "correct `file_name`, or remove the line"
                )
            captions += captions_of_key(entry, key, where)
    if missing := next((image for image, captions in found.items() if not captions), None):
        raise UserError(
            f"{KEY}: {printable_path(missing)} has no line in {METADATA}; add one, or remove the image"
        )
    return list(found.values())


def captions_beside(images: Iterable[str]) -> list[list[str]]:
    """Captions of all images, each from a text file of the same name with the suffix .txt, one a line.

    Raises:
        UserError: a text file is missing, unreadable or empty.
    """
    captions = []
    for image in images:
        file = Path(image).with_suffix(f".{BESIDE}")
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(
                f"{KEY}: {printable_path(file)}: cannot be read ({error.strerror}); "
                f"write the caption of {printable_path(Path(image).name)} there, or remove the image"
            ) from None
        captions.append(captions_of_text(content, printable_path(file)))
    return captions


def _lines(file: str) -> Iterable[str]:
    try:
        # as universal newlines and `json` have it: no other character ends a line
        return Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{KEY}: {printable_path(file)}: cannot be read ({one_line(error)}); mend it"
        ) from None
