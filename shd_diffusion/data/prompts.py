"""Prompts without images, for a teacher that samples its own training latents."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from shd_diffusion.data.captions import captions_of_text
from shd_diffusion.data.hub import caption_hashes, caption_table, captions_at, load_table
from shd_diffusion.data.image_sets import Images
from shd_diffusion.errors import UserError, printable_path
from shd_diffusion.files import json_sha256


class Prompts(Images):
    """Prompts, each of which stands for an image that is yet to be sampled.

    They come from a text file, one a line, or from a data set of the `datasets` library. Of an image only its size is
    known: `shape` and `geometry` are those of an image that is sampled, `image` is an error.

    Args:
        path: of the text file; or of the data set, as for `HubImages`.
        split: of the data set.
        size: images are to be (3, size, size).
        caption_column: holds the prompts, strings or lists of strings; None for a text file.

    Raises:
        UserError: there is no such file or data set, or it holds no prompts.
    """

    def __init__(self, path: str, split: str, size: int, caption_column: str | None = None) -> None:
        self.path, self.shape = path, (3, size, size)
        self.caption_column = caption_column
        if caption_column is None:
            self.lines = _read_lines(Path(path))
        else:
            self.table = caption_table(load_table(path, split), caption_column, path, self.name)

    def __len__(self) -> int:
        return len(self.lines if self.caption_column is None else self.table)

    def image(self, index: int) -> Tensor:
        raise no_images(self.path)

    def captions(self, index: int) -> list[str]:
        if self.caption_column is None:
            return [self.lines[index]]
        return captions_at(self.table, index, self.caption_column)

    def name(self, index: int) -> str:
        return f"{printable_path(self.path)}: prompt {index}"

    def fingerprint(self) -> str:
        if self.caption_column is None:
            return json_sha256(self.lines)
        return hashlib.sha256(b"".join(caption_hashes(self.table, self.caption_column))).hexdigest()


def no_images(path: str | None) -> UserError:
    """What is said where images of prompts are asked for."""
    return UserError(
        f"data.name: `prompts` ({path}) has no images; train on the latents that `shd-diffusion prepare` lets the "
        "teacher sample for it, and compare with those that `evaluate.reference` names"
    )


def _read_lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.path: {printable_path(path)}: cannot be read ({error.strerror}); give a text file of prompts, "
            "one a line, or a data set, and its column by `data.caption_column`"
        ) from None
    return captions_of_text(content, printable_path(path), "data.path")
