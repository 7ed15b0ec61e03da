"""WebDataset shards, tar files of images with their captions, read by index."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from glob import glob
from itertools import accumulate
from pathlib import Path

from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.framing import Framing
from shd_diffusion.data.image_sets import ImageFiles
from shd_diffusion.data.tar_index import IMAGE_EXTENSIONS, ShardIndex, index_of
from shd_diffusion.errors import UserError, one_line, printable_path
from shd_diffusion.processes import processes
from shd_diffusion.progress import progress_bar


class ShardedImages(ImageFiles):
    """The images of WebDataset shards in their order: `.jpg`, `.jpeg`, `.png` and `.webp`.

    A shard is read through once, for its index (tar_index.py), which the processes of a launch share among
    themselves; then only the images that are asked for are read.

    Args:
        pattern: paths of the shards, with braces (`{000..123}`) and wildcards; several patterns with `::` between.
        framing: how images are cut.
        caption_column: the extension of the captions, one a line, or `json.KEY`; None for no captions.

    Raises:
        UserError: the library `webdataset` is not installed, no shard is there, one is damaged, or an image has no
            caption.
    """

    def __init__(self, pattern: str, framing: Framing, caption_column: str | None = None) -> None:
        super().__init__(framing)
        self.shards = find_shards(pattern)
        self.caption_column = caption_column
        self.indices = _read_indices(self.shards, caption_column)
        self.stops = list(accumulate(map(len, self.indices)))
        if not len(self):
            known = ", ".join(IMAGE_EXTENSIONS)
            raise UserError(f"data.path: {pattern}: no images in these shards ({known}); give others")

    def __len__(self) -> int:
        return self.stops[-1]

    def file(self, index: int) -> bytes:
        shard, row = self._find(index)
        start, length = self.indices[shard].spans[row].tolist()
        try:
            with self.shards[shard].open("rb") as file:
                file.seek(start)
                return file.read(length)
        except OSError as error:
            raise UnreadableImage(f"{self.name(index)}: cannot be read ({error.strerror})") from None

    def captions(self, index: int) -> list[str]:
        shard, row = self._find(index)
        return self.indices[shard].name_and_captions(row)[1]

    def name(self, index: int) -> str:
        shard, row = self._find(index)
        name, _ = self.indices[shard].name_and_captions(row)
        return f"{printable_path(self.shards[shard])}: {printable_path(name)}"

    def content(self) -> str:
        """Names and sizes of all shards, where their images lie, some of these themselves, and the captions of all; no
        times, since a copy has others."""
        digest = hashlib.sha256()
        for path, index in zip(self.shards, self.indices, strict=True):
            digest.update(f"{printable_path(path.name)}\0{path.stat().st_size}\0".encode())
            digest.update(index.spans.numpy().tobytes())
            digest.update(index.text.numpy().tobytes())
        for file in self.some_files():
            digest.update(file)
        return digest.hexdigest()

    def _find(self, index: int) -> tuple[int, int]:
        """The number of the shard that holds an image, and the image's number there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = bisect_right(self.stops, index)
        return shard, index - (self.stops[shard] - len(self.indices[shard]))


def find_shards(pattern: str) -> list[Path]:
    """The shards that a pattern of `webdataset` names, each once; those of a wildcard by name.

    Raises:
        UserError: the library is not installed, the pattern is none, or names what is not there.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ModuleNotFoundError:
        raise UserError(
            "data.name: `webdataset` needs the library of that name; pip install 'shd-diffusion[webdataset]'"
        ) from None
    try:
        names = expand_urls(pattern)
    except Exception as error:  # unbalanced braces and variables that are not set, by errors of several kinds
        raise UserError(
            f"data.path: {pattern}: not a pattern of shards ({one_line(error)}); write it as shard-{{000..123}}.tar"
        ) from None
    found: dict[str, None] = {}
    for name in names:
        paths = [name] if Path(name).exists() else sorted(glob(name))  # noqa: PTH207 -- it may be absolute
        if not paths:
            raise UserError(
                f"data.path: {printable_path(name)}: no such file; shards are read by index, so give files on disk, "
                "such as folder/*.tar"
            )
        found |= dict.fromkeys(paths)
    return [Path(path) for path in found]


def _read_indices(shards: list[Path], column: str | None) -> list[ShardIndex]:
    """The indices of all shards. Each process of a launch begins at another one, and finds what others have done."""
    state = processes()
    count = len(shards)
    first = count * state.process_index // state.num_processes
    indices = {}
    with progress_bar(count, "shards", "shard", visible=state.is_main_process) as bar:
        for number in [*range(first, count), *range(first)]:
            indices[number] = index_of(shards[number], column)
            bar.update()
    return [indices[number] for number in range(count)]
