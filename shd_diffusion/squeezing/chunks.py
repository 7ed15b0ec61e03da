"""How much of the attention maps exists at a time."""

from __future__ import annotations

import torch

# Elements of teacher maps: on a CPU what its caches hold, on an accelerator enough to occupy it.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**26
_KEPT = 2**24


def chunk_rows_for(shape: tuple[int, ...], device: torch.device) -> int:
    """Query rows, counted over samples, whose maps (of shape (B, M, Q, K)) are computed at once on a device."""
    _, heads, _, keys = shape
    return max(1, _CHUNK.get(device.type, _CHUNK_ELSEWHERE) // (heads * keys))


def may_be_kept(shape: tuple[int, ...]) -> bool:
    """Whether one sample's maps are few enough to be kept for a second walk rather than computed again."""
    _, heads, rows, keys = shape
    return heads * rows * keys <= _KEPT


def cut(total: int, size: int, multiple: int = 1) -> list[slice]:
    """Slices that cover range(total), of about `size` (equally long, rounded up to a multiple)."""
    pieces = max(1, -(-total // max(size, 1)))
    step = max(1, -(-total // pieces))
    step = -(-step // multiple) * multiple
    return [slice(start, min(start + step, total)) for start in range(0, total, step)]
