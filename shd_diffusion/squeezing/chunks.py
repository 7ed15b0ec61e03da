"""Attention maps that are had chunk by chunk, so that they never exist all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Chunk: TypeAlias = tuple[slice, slice, Tensor]
"""Samples, query rows, and their maps (samples, heads, rows, K)."""

# Elements of maps at once: on a CPU what its caches hold, on an accelerator enough to occupy it.
_AT_ONCE = {"cpu": 2**20}
_AT_ONCE_ELSEWHERE = 2**26
_KEPT = 2**24


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
    return MapStream((batch, heads, rows, keys), lambda: [(slice(0, batch), slice(0, rows), maps)])


class Workspace:
    """Memory for maps that are walked more than once, used again by block after block.

    Fresh memory costs a CPU more (page faults) than computing the maps that go into it.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """(elements,), of any content; what was taken before is given up."""
        memory = self._memory
        if memory is None or memory.numel() < elements or memory.dtype != dtype or memory.device != device:
            memory = self._memory = torch.empty(elements, dtype=dtype, device=device)
        return memory[:elements]


def stream(
    shape: tuple[int, int, int, int],
    logits: Callable[[slice, slice], Tensor],
    device: torch.device,
    chunk_rows: int | None = None,
    multiple: int = 1,
    workspace: Workspace | None = None,
) -> MapStream:
    """Maps that are computed when they are needed.

    Args:
        shape: (B, M, Q, K).
        logits: computes those of some samples and query rows, (samples, M, rows, K).
        device: where; it decides how much is computed at once.
        chunk_rows: query rows, counted over samples, whose maps may exist at once; None leaves it to the device.
        multiple: of how many rows a chunk consists.
        workspace: where maps that are few are kept from one walk to the next, if `chunk_rows` allows it; None
            computes them at each walk.
    """
    batch, heads, rows, keys = shape
    at_once = chunk_rows or max(1, _AT_ONCE.get(device.type, _AT_ONCE_ELSEWHERE) // (heads * keys))
    parts = [
        (samples, part)
        for samples in cut(batch, max(1, at_once // max(rows, 1)))
        for part in cut(rows, min(at_once, rows), multiple)
    ]

    def walk() -> Iterable[Chunk]:
        return ((samples, part, logits(samples, part).softmax(-1)) for samples, part in parts)

    few = len(parts) == 1 or (chunk_rows is None and batch * rows * heads * keys <= _KEPT)
    if workspace is None or not few:
        return MapStream(shape, walk)

    def walk_into(memory: Workspace) -> Iterable[Chunk]:
        start = 0
        for samples, part in parts:
            found = logits(samples, part)
            into = memory.take(batch * rows * heads * keys, found.dtype, device)[start:][: found.numel()]
            start += found.numel()
            yield samples, part, torch.softmax(found, -1, out=into.view(found.shape))

    return kept(MapStream(shape, lambda: walk_into(workspace)))


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


def part_of(tensor: Tensor, samples: slice, rows: slice, dimension: int = -1) -> Tensor:
    """The samples and query rows of a tensor (B, ...); a length of 1 along `dimension` stands for all rows."""
    tensor = tensor[samples]
    return (
        tensor
        if tensor.shape[dimension] == 1
        else tensor.narrow(dimension, rows.start, rows.stop - rows.start)
    )
