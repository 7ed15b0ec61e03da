"""Records on some of their samples, query rows and keys; token grids of different size brought together."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt
from typing import TypeAlias

import torch
from torch import Tensor

from shd_diffusion.attention.records import AttentionRecord, taken
from shd_diffusion.randomness import generator

Pool: TypeAlias = tuple[int, int]
"""So many neighbouring query rows and keys of a finer map make one of the coarser."""


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
    counted = record.some_counted(samples, rows)
    if samples is not None:
        query, key, value = (tensor.index_select(0, samples) for tensor in (query, key, value))
    if rows is not None:
        query = query.index_select(2, rows)
    if keys is not None:
        key, value = (tensor.index_select(2, keys) for tensor in (key, value))
    mask = taken(mask, samples, rows)
    if mask is not None and keys is not None:
        mask = mask.index_select(3, keys)
    return replace(record, query=query, key=key, value=value, mask=mask, counted=counted)


def common_grid(
    teacher: AttentionRecord, student: AttentionRecord, size: tuple[int, ...] | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """For teacher and student: their query rows by row of the coarser grid (rows, ratio²), and so their keys.

    Args:
        teacher: a block's record.
        student: of the block that learns from it.
        size: height and width of what both models see, in the ratio of which the grids are; None: square.

    Raises:
        ValueError: tokens that are no image grid differ, no grid has this ratio, or one is no multiple of the other.
    """
    found = []
    for kinds, of_teacher, of_student in (
        (("self", "cross"), teacher.query.shape[2], student.query.shape[2]),
        (("self",), teacher.key.shape[2], student.key.shape[2]),
    ):
        if of_teacher != of_student and teacher.kind not in kinds:
            raise ValueError(
                f"{teacher.kind}-attention over {of_teacher} and {of_student} tokens cannot be compared"
            )
        coarse = min(of_teacher, of_student)
        found.append((coarsening(of_teacher, coarse, size), coarsening(of_student, coarse, size)))
    (teacher_rows, student_rows), (teacher_keys, student_keys) = found
    return (teacher_rows, teacher_keys), (student_rows, student_keys)


def coarsening(fine: int, coarse: int, size: tuple[int, ...] | None = None) -> Tensor:
    """Tokens of a fine grid by the token of the coarse grid into which they fall: (coarse, ratio²)."""
    if fine == coarse:
        return torch.arange(fine)[:, None]
    height, width = size or (1, 1)
    rows, columns = grid_shape(fine, height, width)
    coarse_rows, coarse_columns = grid_shape(coarse, height, width)
    ratio = rows // max(coarse_rows, 1)
    if not ratio or (rows, columns) != (coarse_rows * ratio, coarse_columns * ratio):
        raise ValueError(
            f"maps over {fine} and {coarse} tokens: grids of {height}:{width} compare, one a multiple of the other"
        )
    tokens = torch.arange(fine).view(coarse_rows, ratio, coarse_columns, ratio)
    return tokens.transpose(1, 2).reshape(coarse, ratio**2)


def grid_shape(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of so many tokens in the ratio of height to width; (0, 0) if there is no such grid."""
    rows = isqrt(tokens * height // width)
    columns = tokens // rows if rows else 0
    return (rows, columns) if rows * columns == tokens and rows * width == columns * height else (0, 0)


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
