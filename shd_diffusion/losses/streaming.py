"""The divergence of a student's maps from their targets, without ever holding all of the maps.

The seam for other backends: a fused kernel may replace `map_divergence` behind the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.divergence import DivergenceFunction, safe_log
from shd_diffusion.squeezing.chunks import Chunk

Pool: TypeAlias = tuple[int, int]
"""So many neighbouring query rows and keys of a finer map make one of the coarser."""


def map_divergence(
    student: AttentionRecord,
    targets: Callable[[], Iterable[Chunk]],
    divergence: DivergenceFunction,
    temperature: float = 1.0,
    pool: Pool = (1, 1),
) -> Tensor:
    """Mean divergence, over the query rows, of a student's maps from their targets.

    Maps exist for one chunk at a time. The gradient is linear in each head's upstream gradient, so it is formed
    in the same pass, while a chunk's maps are at hand: only gradients in the shapes of query and key wait for
    the backward pass, and no map is computed twice.

    Args:
        student: the gradient goes to its query and key.
        targets: the maps to learn, chunk by chunk.
        divergence: from `DIVERGENCES`.
        temperature: τ of the student's maps.
        pool: the student's share of bringing both maps to one grid.

    Returns:
        (B, H), float32 or better.
    """
    found: Tensor = _MapDivergence.apply(
        student.query, student.key, student, targets, divergence, temperature, pool
    )
    return found


class _MapDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        student: AttentionRecord,
        targets: Callable[[], Iterable[Chunk]],
        divergence: DivergenceFunction,
        temperature: float,
        pool: Pool,
    ) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        batch, heads, rows, _ = query.shape
        values = query.new_zeros((batch, heads), dtype=dtype)
        learns = any(ctx.needs_input_grad[:2])
        of_query, of_key = (
            torch.zeros_like(tensor, dtype=dtype) if learns else None for tensor in (query, key)
        )
        for samples, part, target in targets():
            own = slice(part.start * pool[0], part.stop * pool[0])
            value, gradient = _chunk(student, samples, own, target, divergence, temperature, pool)
            values[samples] += value.sum(-1)
            if of_query is not None and of_key is not None:
                of_query[samples, :, own] = gradient @ key[samples].to(dtype)
                of_key[samples] += gradient.mT @ query[samples, :, own].to(dtype)
        if of_query is not None and of_key is not None:
            ctx.save_for_backward(of_query, of_key)
            ctx.scale, ctx.dtypes = student.scale / temperature / (rows // pool[0]), (query.dtype, key.dtype)
        return values.div_(rows // pool[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        by_head = (upstream * ctx.scale)[:, :, None, None]
        gradients = (saved * by_head for saved in ctx.saved_tensors)
        return *(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)), *[None] * 5


def _chunk(
    student: AttentionRecord,
    samples: slice,
    rows: slice,
    target: Tensor,
    divergence: DivergenceFunction,
    temperature: float,
    pool: Pool,
) -> tuple[Tensor, Tensor]:
    """Divergence of each target row (samples, H, rows) and its gradient by the student's logits."""
    if pool == (1, 1):
        return divergence(target, log_maps(student, samples, rows, temperature))
    maps = chunk_logits(student, samples, rows, temperature).softmax(-1)
    coarse = pooled(maps, pool)
    value, gradient = divergence(target, safe_log(coarse))
    # log q of the pooled map stands for its logits; from there through log and pooling to the map itself
    slope = gradient / coarse.clamp_min(torch.finfo(maps.dtype).tiny) / pool[0]
    slope = slope.repeat_interleave(pool[0], -2).repeat_interleave(pool[1], -1)
    return value, maps * (slope - torch.linalg.vecdot(maps, slope)[..., None])


def log_maps(
    record: AttentionRecord, samples: slice, rows: slice, temperature: float = 1.0, pool: Pool = (1, 1)
) -> Tensor:
    """log q of a chunk of a record's maps on the targets' grid; finite at masked keys too, so that 0 · log 0 = 0."""
    logits = chunk_logits(record, samples, rows, temperature)
    if pool != (1, 1):
        return safe_log(pooled(logits.softmax(-1), pool))
    found = logits.log_softmax(-1)
    return found if record.mask is None else found.clamp_min_(torch.finfo(found.dtype).min)


def pooled(maps: Tensor, pool: Pool) -> Tensor:
    """Maps on a coarser grid: the mean of neighbouring query rows, the sum of neighbouring keys."""
    rows, keys = pool
    if keys > 1:
        maps = maps.unflatten(-1, (-1, keys)).sum(-1)
    return maps.unflatten(-2, (-1, rows)).mean(-2) if rows > 1 else maps


def chunk_logits(record: AttentionRecord, samples: slice, rows: slice, temperature: float = 1.0) -> Tensor:
    """A record's logits over the temperature for a chunk of it, (samples, H, rows, K), in float32 or better."""
    dtype = torch.promote_types(record.query.dtype, torch.float32)
    query = record.query[samples, :, rows].to(dtype) * (record.scale / temperature)
    logits = query @ record.key[samples].to(dtype).mT
    if record.mask is None:
        return logits
    mask = record.mask[(None,) * (4 - record.mask.ndim)]
    mask = mask if mask.shape[0] == 1 else mask[samples]
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    return logits + mask.to(dtype) / temperature
