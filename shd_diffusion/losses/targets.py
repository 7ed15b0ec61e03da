"""The maps that a student is to learn: a teacher's, squeezed, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.streaming import Pool, chunk_logits, pooled
from shd_diffusion.squeezing.chunks import chunk_rows_for, cut, may_be_kept
from shd_diffusion.squeezing.coefficients import Coefficient
from shd_diffusion.squeezing.plan import Group
from shd_diffusion.squeezing.weights import (
    Granularity,
    Squeezer,
    Stream,
    apply_weights,
    squeeze_weights,
    with_weights,
)


@dataclass(frozen=True)
class SqueezedTeacher:
    """A teacher's block squeezed to the student's heads.

    Attributes:
        record: what the teacher attended to, on the query rows that are wanted.
        source: the record, with all its query rows, that sample-wise coefficients come from.
        squeezer: the plan, prepared for the record's output weight.
        temperature: τ of the maps that are merged; the coefficients are those of τ = 1.
        granularity: of the coefficients.
        coefficient: how they are found.
        order: the squeezed head that each student head learns; None for head j learning j.
        pool: the teacher's share of bringing both maps to one grid.
        chunk_rows: query rows, counted over samples, whose maps may exist at once; None leaves it to the device,
            and keeps a sample's maps, where they are few, rather than computing them twice.
    """

    record: AttentionRecord
    source: AttentionRecord
    squeezer: Squeezer
    temperature: float = 1.0
    granularity: Granularity = "sample"
    coefficient: Coefficient = "closed_form"
    order: tuple[int, ...] | None = None
    pool: Pool = (1, 1)
    chunk_rows: int | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The teacher heads behind the map that each student head learns."""
        groups = self.squeezer.groups
        return groups if self.order is None else tuple(groups[head] for head in self.order)

    def chunks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Samples, rows of the pooled maps, and the target maps (samples, N, rows, K), in float32 or better."""
        batch, _, rows, _ = shape = map_shape(self.record)
        at_once = self.chunk_rows or chunk_rows_for(shape, self.record.query.device)
        parts = cut(rows, at_once, self.pool[0])
        for samples in cut(batch, at_once // rows):
            stream = self._stream(self.record, samples, at_once)
            source = stream if self.source is self.record else self._stream(self.source, samples, at_once)
            weights, _ = self.weights(samples, source)
            for part, (maps, share) in zip(
                parts, with_weights(self._softened(samples, parts, stream), weights), strict=True
            ):
                target = pooled(apply_weights(maps, share, self.groups), self.pool)
                yield samples, slice(part.start // self.pool[0], part.stop // self.pool[0]), target

    def weights(self, samples: slice, stream: Stream) -> tuple[Tensor, Tensor]:
        """`squeeze_weights` of some samples, the squeezed heads in the student's order."""
        value = self.source.value[samples]
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        weights, coefficients = squeeze_weights(
            stream, value, self.squeezer, self.granularity, self.coefficient
        )
        return weights if self.order is None else weights[:, list(self.order)], coefficients

    def _stream(self, record: AttentionRecord, samples: slice, at_once: int) -> Stream:
        """The maps at τ = 1, to be walked more than once."""
        shape = map_shape(record)
        parts = cut(shape[2], at_once, self.pool[0])

        def walk() -> Iterator[Tensor]:
            return (chunk_logits(record, samples, part).softmax(-1) for part in parts)

        if len(parts) > 1 and (self.chunk_rows is not None or not may_be_kept(shape)):
            return walk
        kept = list(walk())
        return lambda: kept

    def _softened(self, samples: slice, parts: list[slice], stream: Stream) -> Iterator[Tensor]:
        """The maps at τ."""
        if self.temperature == 1:
            yield from stream()
        else:
            for part in parts:
                yield chunk_logits(self.record, samples, part, self.temperature).softmax(-1)


def map_shape(record: AttentionRecord) -> tuple[int, int, int, int]:
    """(B, H, Q, K)."""
    batch, heads, rows, _ = record.query.shape
    return batch, heads, rows, record.key.shape[2]


def calibration_batch(record: AttentionRecord) -> tuple[Stream, Tensor]:
    """A teacher's record as `match_merges` takes it: its maps, computed again at each walk, and its values."""
    everything = slice(None)
    parts = cut(map_shape(record)[2], chunk_rows_for(map_shape(record), record.query.device))
    value = record.value.to(torch.promote_types(record.value.dtype, torch.float32))
    return lambda: (chunk_logits(record, everything, part).softmax(-1) for part in parts), value
