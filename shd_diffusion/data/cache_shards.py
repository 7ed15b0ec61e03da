"""The files of a cache of latents, and which images are in which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.framing import Size
from shd_diffusion.data.image_sets import Images
from shd_diffusion.errors import UserError
from shd_diffusion.files import json_sha256, read_json, sha256
from shd_diffusion.progress import announce, progress_bar


@dataclass(frozen=True)
class Shard:
    """One file of the cache: some images of the source, all of one size (H, W).

    `identity` stands for all that it follows from.
    """

    folder: Path
    number: int
    indices: Sequence[int]
    size: Size
    identity: str

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def path(self) -> Path:
        return self.folder / "shards" / f"latents-{self.number:05d}.safetensors"

    @property
    def record_file(self) -> Path:
        return self.path.with_suffix(".json")

    def read_record(self) -> dict[str, Any]:
        return read_json(self.record_file)

    def is_done(self) -> bool:
        """Whether the shard is there, and as it was written."""
        if not (self.record_file.is_file() and self.path.is_file()):
            return False
        try:
            record = self.read_record()
            whole = record["identity"] == self.identity and record["sha256"] == sha256(self.path)
        except (UserError, KeyError, TypeError):
            whole = False
        if not whole:
            announce(f"{self.path}: damaged, or of another cache; it is written anew")
        return whole


def plan_shards(
    output: Path, images: Images, size: int, identity: str, finished: Iterable[dict[str, Any]] = ()
) -> list[Shard]:
    """The shards of a data set, bucket by bucket, `size` images in each but the last of a bucket.

    Args:
        identity: of the cache.
        finished: the records of the shards where the cache is complete already.
    """
    chunks = [
        (bucket_size, bucket[start : start + size])
        for bucket_size, bucket in by_size(images).items()
        for start in range(0, len(bucket), size)
    ]
    # Which images are in a shard of one of several buckets hangs on headers, which may not be read for a moment.
    # Complete caches of earlier versions, whose shards have but the cache's identity, stay as runs know them.
    alike = len(images.buckets) == 1 or any(record.get("identity") == identity for record in finished)
    return [
        Shard(output, number, chunk, bucket_size, identity if alike else json_sha256([identity, list(chunk)]))
        for number, (bucket_size, chunk) in enumerate(chunks)
    ]


def by_size(images: Images) -> dict[Size, Sequence[int]]:
    """Indices of images by their size, in the order of the buckets; one that cannot be read is in the first."""
    if len(images.buckets) == 1:
        return {images.buckets[0]: range(len(images))}
    found: dict[Size, list[int]] = {size: [] for size in images.buckets}
    with progress_bar(len(images), "sizes", "image") as bar:
        for index in range(len(images)):
            try:
                size = images.geometry(index).size
            except UnreadableImage:
                size = images.buckets[0]
            found[size].append(index)
            bar.update()
    return {size: indices for size, indices in found.items() if indices}
