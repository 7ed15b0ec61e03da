"""Where the images of a WebDataset shard lie in its file, and their captions: read through once, then kept.

A shard is a tar; members of one name up to the first dot, one after the other, are a sample (`a.jpg`, `a.txt`). The
library `webdataset` reads shards in their order alone, so their members are found by tarfile, and grouped as it does.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shd_diffusion.data.captions import KEY, captions_of_key, captions_of_text
from shd_diffusion.errors import UserError, did_you_mean, one_line, printable_path
from shd_diffusion.files import cache_folder, json_sha256, save_tensors

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
VERSION = 1  # of what a kept index holds


@dataclass(frozen=True)
class ShardIndex:
    """The N images of a shard, without an object for each: there may be millions.

    Attributes:
        spans: (N, 2) int64, where the file of each image begins in the shard, and its length in bytes.
        lines: (N + 1,) int64, where the line of each image begins in `text`; then the end.
        text: uint8, JSON: a line an image, its name in the shard, then its captions.
    """

    spans: Tensor
    lines: Tensor
    text: Tensor

    def __len__(self) -> int:
        return len(self.spans)

    def name_and_captions(self, index: int) -> tuple[str, list[str]]:
        """The name of an image in the shard, and what is said of it."""
        start, stop = self.lines[index : index + 2].tolist()
        name, *captions = json.loads(self.text[start:stop].numpy().tobytes())
        return name, captions


def index_of(shard: Path, column: str | None) -> ShardIndex:
    """The index of a shard, which is kept in `cache_folder` until the shard changes.

    Args:
        shard: path of the tar.
        column: where the captions are: an extension, or `json.KEY`; None without captions.

    Raises:
        UserError: the shard is missing or damaged, an image has no caption, or the index cannot be written.
    """
    try:
        status = shard.stat()
    except OSError as error:
        raise _unreadable(shard, error.strerror) from None
    key = [VERSION, str(shard.absolute()), status.st_size, status.st_mtime_ns, column]
    path = cache_folder() / "shards" / f"{json_sha256(key)[:32]}.safetensors"
    try:
        return ShardIndex(**load_file(path))
    except (OSError, SafetensorError, TypeError):  # none yet, or a damaged one
        index = read_index(shard, column)
    try:
        save_tensors({field.name: getattr(index, field.name) for field in fields(index)}, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{printable_path(path)}: cannot be written ({one_line(error)}); set XDG_CACHE_HOME to a folder that can"
        ) from None
    return index


def read_index(shard: Path, column: str | None) -> ShardIndex:
    """The index of a shard from the shard itself; arguments and errors as for `index_of`."""
    spans: list[tuple[int, int]] = []
    lines: list[bytes] = []
    try:
        with tarfile.open(shard, "r:") as tar:
            for sample in _samples(tar):
                image = next((sample[one] for one in IMAGE_EXTENSIONS if one in sample), None)
                if image is None:  # notes on the whole shard, say
                    continue
                captions = [] if column is None else _captions(tar, sample, image, column)
                spans.append((image.offset_data, image.size))
                lines.append(json.dumps([image.name, *captions]).encode())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _unreadable(shard, one_line(error)) from None
    except ValueError as error:  # of `group_by_keys`, which adds where it was
        raise _unreadable(shard, one_line(error.args[0])) from None
    return ShardIndex(
        torch.tensor(spans, dtype=torch.int64).view(-1, 2),
        torch.tensor([0, *map(len, lines)]).cumsum(0),
        torch.from_numpy(np.frombuffer(b"".join(lines), np.uint8).copy()),
    )


def _samples(tar: tarfile.TarFile) -> Iterator[dict[str, tarfile.TarInfo]]:
    """Members by extension, grouped to samples as the library has it.

    Raises:
        ValueError: a sample has two members of one extension.
    """
    from webdataset.tariterators import group_by_keys

    def members() -> Iterable[dict[str, Any]]:
        for member in tar:
            if member.isreg() and not re.match(r"__[^/]*__($|/)", member.name):
                yield {"fname": member.name, "data": member, "__url__": tar.name}
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them

    for sample in group_by_keys(members()):
        yield {name: member for name, member in sample.items() if isinstance(member, tarfile.TarInfo)}


def _captions(
    tar: tarfile.TarFile, sample: Mapping[str, tarfile.TarInfo], image: tarfile.TarInfo, column: str
) -> list[str]:
    shard = printable_path(str(tar.name))
    extension, _, key = column.partition(".") if column.startswith("json.") else (column, "", "")
    if extension == "json" and not key:
        raise UserError(f"{KEY}: `{column}` names no key of the .json files; write it as json.KEY")
    if extension not in sample:
        raise UserError(
            f"{KEY}: {shard}: {printable_path(image.name)} has no member `{extension}` beside it; "
            f"{did_you_mean(extension, sample)}"
        )
    member = sample[extension]
    where = f"{shard}: {printable_path(member.name)}"
    file = tar.extractfile(member)
    content = file.read() if file else b""
    if not key:
        return captions_of_text(content, where)
    try:
        entry = json.loads(content)
    except ValueError as error:
        raise UserError(f"{KEY}: {where}: not JSON ({one_line(error)}); mend it") from None
    return captions_of_key(entry, key, where)


def _unreadable(shard: Path, reason: str | None) -> UserError:
    return UserError(
        f"data.path: {printable_path(shard)}: no tar file that can be read by index ({reason}); get it again "
        "uncompressed, or leave it out"
    )
