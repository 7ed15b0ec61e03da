"""Records on some of their samples, query rows and keys; token grids of different size brought together."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

import torch
from torch import Tensor

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.streaming import Pool
from shd_diffusion.randomness import generator


def sample_rows(count: int, share: float, seed: int, *names: int | str) -> Tensor | None:
    """A share of `count` query rows, none twice, that follows from the seed and names; None for all.

    Every row is equally likely, so a mean over these rows is an unbiased estimate of the mean over all.
    """
    wanted = max(1, round(share * count))
    if wanted == count:
        return None
    return torch.randperm(count, generator=generator(seed, "rows", *names))[:wanted].sort().values


def take(
    record: AttentionRecord,
    samples: Tensor | None = None,
    rows: Tensor | None = None,
    keys: Tensor | None = None,
) -> AttentionRecord:
    """The record on these samples, query rows and keys, in this order; None for all."""
    query, key, value, mask = record.query, record.key, record.value, record.mask
    samples, rows, keys = (None if i is None else i.to(query.device) for i in (samples, rows, keys))
    if samples is not None:
        query, key, value = (tensor.index_select(0, samples) for tensor in (query, key, value))
    if rows is not None:
        query = query.index_select(2, rows)
    if keys is not None:
        key, value = (tensor.index_select(2, keys) for tensor in (key, value))
    if mask is not None:
        mask = mask[(None,) * (4 - mask.ndim)]
        for dimension, index in ((0, samples), (2, rows), (3, keys)):
            if index is not None and mask.shape[dimension] > 1:
                mask = mask.index_select(dimension, index)
    return replace(record, query=query, key=key, value=value, mask=mask)


def common_grid(
    teacher: AttentionRecord, student: AttentionRecord
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For teacher and student: their query rows by row of the coarser grid (rows, ratio²), and so their keys.

    Raises:
        ValueError: tokens that are no image grid differ, a grid is not square, or one is no multiple of the other.
    """
    found = []
    for kinds, theirs, ours in (
        (("self", "cross"), teacher.query.shape[2], student.query.shape[2]),
        (("self",), teacher.key.shape[2], student.key.shape[2]),
    ):
        if theirs != ours and teacher.kind not in kinds:
            raise ValueError(f"{teacher.kind}-attention over {theirs} and {ours} tokens cannot be compared")
        coarse = min(theirs, ours)
        found.append((coarsening(theirs, coarse), coarsening(ours, coarse)))
    (their_rows, our_rows), (their_keys, our_keys) = found
    return (their_rows, their_keys), (our_rows, our_keys)


def coarsening(fine: int, coarse: int) -> Tensor:
    """Tokens of a fine square grid by the token of the coarse grid into which they fall: (coarse, ratio²)."""
    if fine == coarse:
        return torch.arange(fine)[:, None]
    side, coarse_side = isqrt(fine), isqrt(coarse)
    if side**2 != fine or coarse_side**2 != coarse or side % coarse_side:
        raise ValueError(
            f"maps over {fine} and {coarse} tokens: square grids compare, one a multiple of the other"
        )
    ratio = side // coarse_side
    tokens = torch.arange(fine).view(coarse_side, ratio, coarse_side, ratio)
    return tokens.transpose(1, 2).reshape(coarse, ratio**2)


def on_grid(
    record: AttentionRecord, tokens: tuple[Tensor, Tensor], rows: Tensor | None
) -> tuple[AttentionRecord, Pool]:
    """A record so ordered that the tokens of a coarser grid's token are neighbours, and how many they are.

    Args:
        record: of either model.
        tokens: its query rows and its keys by token of the coarser grid, from `common_grid`.
        rows: the coarser grid's query rows that are wanted; None for all.
    """
    of_rows, of_keys = tokens
    pool = of_rows.shape[1], of_keys.shape[1]
    wanted = of_rows if rows is None else of_rows[rows]
    return take(
        record,
        rows=None if rows is None and pool[0] == 1 else wanted.flatten(),
        keys=None if pool[1] == 1 else of_keys.flatten(),
    ), pool
