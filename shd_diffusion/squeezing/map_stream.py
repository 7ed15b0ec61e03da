"""Attention maps that are had chunk by chunk, so that they never exist all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Part: TypeAlias = tuple[slice, slice]
"""Some samples, and of those some query rows."""

EVERYTHING: Part = (slice(None), slice(None))

Chunk: TypeAlias = tuple[Part, Tensor]
"""A part, and its maps (samples, heads, rows, K)."""

# Elements of maps at once: on a CPU what its caches hold, on an accelerator enough to occupy it.
_AT_ONCE = {"cpu": 2**20}
_AT_ONCE_ELSEWHERE = 2**26
# Elements of maps that are read again rather than computed again.
_KEPT = 2**24
# Elements of the maps of samples that are squeezed together: operations on coefficients cost their calls alone, so a
# few chunks share them; not many, since each is a part of the graph under torch.compile.
_TOGETHER = 2**22


@dataclass(frozen=True, slots=True)
class MapStream:
    """Maps of a known shape that can be walked through as often as wanted.

    Attributes:
        shape: (B, M, Q, K).
        walk: yields chunks that together cover all samples and query rows.
    """

    shape: tuple[int, int, int, int]
    walk: Callable[[], Iterable[Chunk]]


def whole(maps: Tensor) -> MapStream:
    """Maps that exist already, as one chunk."""
    batch, heads, rows, keys = maps.shape
    return MapStream((batch, heads, rows, keys), lambda: [(EVERYTHING, maps)])


def stream(
    shape: tuple[int, int, int, int],
    logits: Callable[[Part], Tensor],
    device: torch.device,
    chunk_rows: int | None = None,
    multiple: int = 1,
) -> MapStream:
    """Maps that are computed when they are needed; few of them only once.

    Args:
        shape: (B, M, Q, K).
        logits: computes those of a part, (samples, M, rows, K).
        device: where; it decides how much is computed at once.
        chunk_rows: query rows, counted over samples, whose maps may exist at once; None leaves it to the device.
        multiple: of how many rows a chunk consists.
    """
    batch, heads, rows, keys = shape
    at_once = _rows_at_once(shape, device, chunk_rows)
    samples = cut(batch, max(1, at_once // max(rows, 1)))
    parts = [(some, part) for some in samples for part in cut(rows, at_once, multiple)]
    maps = MapStream(shape, lambda: ((part, logits(part).softmax(-1)) for part in parts))
    few = len(parts) == 1 or (chunk_rows is None and batch * heads * rows * keys <= _KEPT)
    return kept(maps) if few else maps


def sample_groups(
    shape: tuple[int, int, int, int], device: torch.device, chunk_rows: int | None = None
) -> list[slice]:
    """Samples that are squeezed together: a few chunks of `stream`, at least one sample."""
    _, heads, rows, keys = shape
    at_once = _rows_at_once(shape, device, chunk_rows)
    if chunk_rows is None:
        at_once = max(at_once, _TOGETHER // (heads * keys))
    return cut(shape[0], max(1, at_once // max(rows, 1)))


def _rows_at_once(shape: tuple[int, int, int, int], device: torch.device, chunk_rows: int | None) -> int:
    _, heads, _, keys = shape
    return chunk_rows or max(1, _AT_ONCE.get(device.type, _AT_ONCE_ELSEWHERE) // (heads * keys))


def kept(maps: MapStream) -> MapStream:
    """The same maps, each computed at the first walk only."""
    chunks: list[Chunk] = []

    def walk() -> Iterable[Chunk]:
        if not chunks:
            chunks.extend(maps.walk())
        return chunks

    return MapStream(maps.shape, walk)


def cut(total: int, size: int, multiple: int = 1) -> list[slice]:
    """Slices that cover range(total), equally long up to a multiple, and of at most `size` where that allows."""
    if not total:
        return []
    pieces = -(-total // size)
    step = -(-total // (pieces * multiple)) * multiple
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]


def part_of(tensor: Tensor, part: Part) -> Tensor:
    """The samples and query rows of a tensor (B, ..., Q); a length of 1 stands for all query rows."""
    samples, rows = part
    return tensor[samples] if tensor.shape[-1] == 1 else tensor[samples, ..., rows]
