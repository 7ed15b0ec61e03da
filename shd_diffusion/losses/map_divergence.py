"""The divergence of a student's maps from a teacher's squeezed ones, without ever holding all of the maps.

The seam for other backends: a fused kernel may replace `map_divergence` behind the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.divergence import DivergenceFunction, forward_kl, forward_kl_of_logits, safe_log
from shd_diffusion.losses.padding import row_share
from shd_diffusion.losses.token_grid import Pool
from shd_diffusion.operations import is_readable
from shd_diffusion.squeezing.coefficients import Coefficient
from shd_diffusion.squeezing.map_stream import Chunk, MapStream, Part, sample_groups, stream
from shd_diffusion.squeezing.merge_weights import Granularity, Squeezer, mixing_weights, mixture


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
    """Mean divergence, over the query rows that count, of a student's maps from their targets.

    Maps exist for a few samples and one chunk of their rows at a time. The gradient is linear in each head's
    upstream gradient, so it is formed in the same pass, while a chunk's maps are at hand: only gradients in the
    shapes of query and key wait for the backward pass, and no map is computed twice.

    Args:
        student: the gradient goes to its query and key; and to its mask where that is learned, as MDTv2's position
            bias is, which has the size of maps anyway. One that samples share wants equal upstream gradients of all.
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
        student.query, student.key, student.mask, student, targets, divergence, temperature, pool, compile
    )
    return found


class _MapDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        student: AttentionRecord,
        targets: Iterable[tuple[slice, Targets]],
        divergence: DivergenceFunction,
        temperature: float,
        pool: Pool,
        compile: bool,
    ) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        share = row_share(student, pool[0], dtype)
        values = query.new_empty(query.shape[:2], dtype=dtype)
        of_query, of_key = (torch.empty_like(tensor, dtype=dtype) for tensor in (query, key))
        of_mask = None
        if mask is not None and ctx.needs_input_grad[2]:
            of_mask = query.new_zeros((len(mask), *query.shape[1:3], key.shape[2]), dtype=dtype)
        student = replace(
            student, query=query, key=key, mask=mask
        )  # what a custom function is given has no graph
        on_samples = _compiled() if compile else _sums
        for samples, some in targets:
            own = None if of_mask is None else of_mask if len(of_mask) == 1 else of_mask[samples]
            found = on_samples(student.of_samples(samples), some, divergence, temperature, pool, own)
            values[samples], of_query[samples], of_key[samples] = found
        ctx.save_for_backward(of_query, of_key, of_mask, share)
        ctx.scale, ctx.temperature = student.scale / temperature, temperature
        ctx.dtypes = query.dtype, key.dtype, None if mask is None else mask.dtype
        ctx.mask_shape = None if mask is None else mask.shape
        return values.mul_(share[:, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_query, of_key, of_mask, share = ctx.saved_tensors
        upstream = upstream * share[:, None]
        by_head = upstream[:, :, None, None]
        gradients = [
            (saved * (by_head * ctx.scale)).to(dtype)
            for saved, dtype in zip((of_query, of_key), ctx.dtypes, strict=False)
        ]
        if of_mask is None:
            return *gradients, *[None] * 7
        shared = len(of_mask) == 1 and is_readable(upstream)
        if shared and not torch.equal(upstream, upstream[:1].expand_as(upstream)):
            raise RuntimeError(
                "samples that share a learned mask must have equal upstream gradients, as a mean gives"
            )
        of_mask = (of_mask * (by_head[: len(of_mask)] / ctx.temperature)).sum_to_size(ctx.mask_shape)
        return *gradients, of_mask.to(ctx.dtypes[2]), *[None] * 6


def _sums(
    student: AttentionRecord,
    targets: Targets,
    divergence: DivergenceFunction,
    temperature: float,
    pool: Pool,
    of_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergences (B, H) of some samples, summed over their rows, and the gradients by query and key.

    The gradients lack the factor of the logits. That by the mask is added to `of_mask`, (B or 1, H, Q, K).
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
        if of_mask is not None:  # of each sample, or of all
            of_mask[samples if len(of_mask) > 1 else slice(None), :, rows].add_(
                gradient if len(of_mask) > 1 else gradient.sum(0)
            )
    return total, of_query, of_key


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    # Blocks of another shape or plan have graphs of their own: one for any shape takes minutes to compile.
    # torch's overloads do not know the last argument.
    return torch.compile(_sums, dynamic=False, recompile_limit=64)  # type: ignore[call-overload]


def _chunk(
    student: AttentionRecord,
    part: Part,
    target: Tensor,
    divergence: DivergenceFunction,
    temperature: float,
    pool: Pool,
) -> tuple[Tensor, Tensor]:
    """Divergence of each target row (samples, H, rows) and its gradient by the student's logits."""
    if pool == (1, 1) and divergence is forward_kl:
        logits = student.comparable_logits(temperature, *part)
        if student.mask is not None:  # 0 · -∞
            logits = logits.clamp_min_(torch.finfo(logits.dtype).min)
        return forward_kl_of_logits(target, logits)
    if pool == (1, 1):
        return divergence(target, log_maps(student, part, temperature))
    maps = student.comparable_logits(temperature, *part).softmax(-1)
    coarse = pooled(maps, pool)
    value, gradient = divergence(target, safe_log(coarse))
    # log q of the pooled map stands for its logits; from there through log and pooling to the map itself
    slope = gradient / coarse.clamp_min(torch.finfo(maps.dtype).tiny) / pool[0]
    slope = slope.repeat_interleave(pool[0], -2).repeat_interleave(pool[1], -1)
    return value, maps * (slope - torch.linalg.vecdot(maps, slope)[..., None])


def log_maps(record: AttentionRecord, part: Part, temperature: float = 1.0, pool: Pool = (1, 1)) -> Tensor:
    """log q of a chunk of a record's maps on the targets' grid; finite at masked keys too, so that 0 · log 0 = 0."""
    logits = record.comparable_logits(temperature, *part)
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


# --- the targets: maps as they are, and a teacher's maps, squeezed ---------------------------------------------


@dataclass(frozen=True)
class PlainMaps:
    """A record's own maps as they are, on a grid of which `pool` is its share."""

    record: AttentionRecord
    pool: Pool = (1, 1)

    def chunks(self) -> Iterator[Chunk]:
        """(B, H, rows of the pooled maps, K), in float32 or better."""
        for (samples, rows), maps in map_stream(self.record, multiple=self.pool[0]).walk():
            coarse = slice(rows.start // self.pool[0], rows.stop // self.pool[0])
            yield (samples, coarse), pooled(maps, self.pool)


@dataclass(frozen=True)
class SqueezedTeacher:
    """A teacher's block squeezed to the student's heads.

    Attributes:
        record: what the teacher attended to, on the query rows that are wanted.
        source: the record that the coefficients come from: the same, or one with all the query rows.
        squeezer: the plan, prepared for the record's output weight.
        temperature: τ of the maps that are merged; the coefficients are those of τ = 1.
        granularity: of the coefficients.
        coefficient: how they are found.
        pool: the teacher's share of bringing both maps to one grid.
        chunk_rows: see `stream`.
    """

    record: AttentionRecord
    source: AttentionRecord
    squeezer: Squeezer
    temperature: float = 1.0
    granularity: Granularity = "sample"
    coefficient: Coefficient = "closed_form"
    pool: Pool = (1, 1)
    chunk_rows: int | None = None

    def by_samples(self) -> Iterator[tuple[slice, SqueezedTeacher]]:
        """The same for some samples after others, see `sample_groups`."""
        query = self.source.query  # of no fewer rows than the record
        shape = *query.shape[:3], self.source.key.shape[2]
        for samples in sample_groups(shape, _counts_as_on(query), self.chunk_rows):
            record = source = self.record.of_samples(samples)
            if self.source is not self.record:
                source = self.source.of_samples(samples)
            yield samples, replace(self, record=record, source=source)

    def chunks(self) -> Iterator[Chunk]:
        """The target maps (B, N, rows of the pooled maps, K), in float32 or better."""
        aligned = self.chunk_rows, self.pool[0]
        if self.source is self.record:
            maps = source = map_stream(self.record, 1.0, *aligned)
        else:
            maps = map_stream(self.record, 1.0, *aligned)
            source = map_stream(self.source, 1.0, self.chunk_rows)
        mix = mixture(self.weights(source)[0], self.squeezer.groups)
        if self.temperature != 1:
            maps = map_stream(self.record, self.temperature, *aligned)
        for part, chunk in maps.walk():
            samples, rows = part
            coarse = slice(rows.start // self.pool[0], rows.stop // self.pool[0])
            yield (samples, coarse), pooled(mix(part, chunk), self.pool)

    def weights(self, source: MapStream) -> tuple[Tensor, Tensor]:
        """`mixing_weights` of the source's maps: which share of each teacher head makes a squeezed one."""
        value = self.source.value.to(torch.promote_types(self.source.value.dtype, torch.float32))
        return mixing_weights(source, value, self.squeezer, self.granularity, self.coefficient)


def map_stream(
    record: AttentionRecord, temperature: float = 1.0, chunk_rows: int | None = None, multiple: int = 1
) -> MapStream:
    """The maps of a record at a temperature, chunk by chunk; see `stream`."""
    batch, heads, rows, _ = record.query.shape

    def logits(part: Part) -> Tensor:
        return record.comparable_logits(temperature, *part)

    shape = batch, heads, rows, record.key.shape[2]
    return stream(shape, logits, _counts_as_on(record.query), chunk_rows, multiple)


def _counts_as_on(tensor: Tensor) -> torch.device:
    """The device that decides how much is computed at once: without content, as much as on an accelerator."""
    return torch.device("meta") if isinstance(tensor, FakeTensor) else tensor.device
