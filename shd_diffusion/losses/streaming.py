"""The divergence of a student's maps from their targets, without ever holding all of the maps.

The seam for other backends: a fused kernel may replace `map_divergence` behind the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.divergence import DivergenceFunction, safe_log
from shd_diffusion.squeezing.chunks import Chunk, Part

Pool: TypeAlias = tuple[int, int]
"""So many neighbouring query rows and keys of a finer map make one of the coarser."""


class Targets(Protocol):
    """Maps to learn, (B, H, rows, K), had chunk by chunk."""

    def chunks(self) -> Iterable[Chunk]: ...


def map_divergence(
    student: AttentionRecord,
    targets: Iterable[tuple[slice, Targets]],
    divergence: DivergenceFunction,
    temperature: float = 1.0,
    pool: Pool = (1, 1),
    compile: bool = False,
) -> Tensor:
    """Mean divergence, over the query rows, of a student's maps from their targets.

    Maps exist for a few samples and one chunk of their rows at a time. The gradient is linear in each head's
    upstream gradient, so it is formed in the same pass, while a chunk's maps are at hand: only gradients in the
    shapes of query and key wait for the backward pass, and no map is computed twice.

    Args:
        student: the gradient goes to its query and key.
        targets: the maps to learn, for some samples after others.
        divergence: from `DIVERGENCES`.
        temperature: τ of the student's maps.
        pool: the student's share of bringing both maps to one grid.
        compile: have `torch.compile` fuse what is done with the maps of some samples, squeezing included. Every
            chunk is a part of the graph.

    Returns:
        (B, H), float32 or better.
    """
    found: Tensor = _MapDivergence.apply(
        student.query, student.key, student, targets, divergence, temperature, pool, compile
    )
    return found


class _MapDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        student: AttentionRecord,
        targets: Iterable[tuple[slice, Targets]],
        divergence: DivergenceFunction,
        temperature: float,
        pool: Pool,
        compile: bool,
    ) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        rows = query.shape[2] // pool[0]
        values = query.new_empty(query.shape[:2], dtype=dtype)
        of_query, of_key = (torch.empty_like(tensor, dtype=dtype) for tensor in (query, key))
        student = replace(student, query=query, key=key)  # what a custom function is given has no graph
        on_samples = _compiled() if compile else _sums
        for samples, some in targets:
            found = on_samples(student.of_samples(samples), some, divergence, temperature, pool)
            values[samples], of_query[samples], of_key[samples] = found
        ctx.save_for_backward(of_query, of_key)
        ctx.scale, ctx.dtypes = student.scale / temperature / rows, (query.dtype, key.dtype)
        return values.div_(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        by_head = (upstream * ctx.scale)[:, :, None, None]
        gradients = (saved * by_head for saved in ctx.saved_tensors)
        return *(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)), *[None] * 6


def _sums(
    student: AttentionRecord,
    targets: Targets,
    divergence: DivergenceFunction,
    temperature: float,
    pool: Pool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergences (B, H) of some samples, summed over their rows, and the gradients by query and key.

    The gradients lack the factor of the logits.
    """
    dtype = torch.promote_types(student.query.dtype, torch.float32)
    query, key = student.query.to(dtype), student.key.to(dtype)
    total, of_query, of_key = query.new_zeros(query.shape[:2]), torch.empty_like(query), torch.zeros_like(key)
    for part, target in targets.chunks():
        samples, rows = own = finer(part, pool)
        value, gradient = _chunk(student, own, target, divergence, temperature, pool)
        total[samples].add_(value.sum(-1))
        of_query[samples, :, rows] = gradient @ key[samples]
        of_key[samples].add_(gradient.mT @ query[samples, :, rows])
    return total, of_query, of_key


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    # Blocks of another shape or plan have graphs of their own. torch's overloads do not know the argument.
    return torch.compile(_sums, recompile_limit=64)  # type: ignore[call-overload]


def _chunk(
    student: AttentionRecord,
    part: Part,
    target: Tensor,
    divergence: DivergenceFunction,
    temperature: float,
    pool: Pool,
) -> tuple[Tensor, Tensor]:
    """Divergence of each target row (samples, H, rows) and its gradient by the student's logits."""
    if pool == (1, 1):
        return divergence(target, log_maps(student, part, temperature))
    maps = chunk_logits(student, part, temperature).softmax(-1)
    coarse = pooled(maps, pool)
    value, gradient = divergence(target, safe_log(coarse))
    # log q of the pooled map stands for its logits; from there through log and pooling to the map itself
    slope = gradient / coarse.clamp_min(torch.finfo(maps.dtype).tiny) / pool[0]
    slope = slope.repeat_interleave(pool[0], -2).repeat_interleave(pool[1], -1)
    return value, maps * (slope - torch.linalg.vecdot(maps, slope)[..., None])


def log_maps(record: AttentionRecord, part: Part, temperature: float = 1.0, pool: Pool = (1, 1)) -> Tensor:
    """log q of a chunk of a record's maps on the targets' grid; finite at masked keys too, so that 0 · log 0 = 0."""
    logits = chunk_logits(record, part, temperature)
    if pool != (1, 1):
        return safe_log(pooled(logits.softmax(-1), pool))
    found = logits.log_softmax(-1)
    return found if record.mask is None else found.clamp_min_(torch.finfo(found.dtype).min)


def finer(part: Part, pool: Pool) -> Part:
    """The part of a finer map that becomes this part when it is pooled."""
    samples, rows = part
    return samples, slice(rows.start * pool[0], rows.stop * pool[0])


def pooled(maps: Tensor, pool: Pool) -> Tensor:
    """Maps on a coarser grid: the mean of neighbouring query rows, the sum of neighbouring keys."""
    rows, keys = pool
    if keys > 1:
        maps = maps.unflatten(-1, (-1, keys)).sum(-1)
    return maps.unflatten(-2, (-1, rows)).mean(-2) if rows > 1 else maps


def chunk_logits(record: AttentionRecord, part: Part, temperature: float = 1.0) -> Tensor:
    """A record's logits over the temperature for a chunk of it, (samples, H, rows, K), in float32 or better."""
    samples, rows = part
    return record.logits(temperature, samples, rows)
