"""The maps that a student is to learn: a teacher's, squeezed, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.streaming import Pool, chunk_logits, pooled
from shd_diffusion.squeezing.chunks import Chunk, MapStream, Part, sample_groups, stream
from shd_diffusion.squeezing.coefficients import Coefficient
from shd_diffusion.squeezing.plan import Group
from shd_diffusion.squeezing.weights import Granularity, Squeezer, mixture, squeeze_weights


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
        order: the squeezed head that each student head learns; None for head j learning j.
        pool: the teacher's share of bringing both maps to one grid.
        chunk_rows: see `stream`.
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

    def by_samples(self) -> Iterator[tuple[slice, SqueezedTeacher]]:
        """The same for some samples after others, see `sample_groups`."""
        query = self.source.query  # of no fewer rows than the record
        shape = *query.shape[:3], self.source.key.shape[2]
        for samples in sample_groups(shape, query.device, self.chunk_rows):
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
        mix = mixture(self.weights(source)[0], self.groups)
        if self.temperature != 1:
            maps = map_stream(self.record, self.temperature, *aligned)
        for part, chunk in maps.walk():
            samples, rows = part
            coarse = slice(rows.start // self.pool[0], rows.stop // self.pool[0])
            yield (samples, coarse), pooled(mix(part, chunk), self.pool)

    def weights(self, source: MapStream) -> tuple[Tensor, Tensor]:
        """`squeeze_weights`, the squeezed heads in the student's order."""
        value = self.source.value.to(torch.promote_types(self.source.value.dtype, torch.float32))
        weights, coefficients = squeeze_weights(
            source, value, self.squeezer, self.granularity, self.coefficient
        )
        return weights if self.order is None else weights[:, list(self.order)], coefficients


def map_stream(
    record: AttentionRecord,
    temperature: float = 1.0,
    chunk_rows: int | None = None,
    multiple: int = 1,
) -> MapStream:
    """The maps of a record at a temperature, chunk by chunk; see `stream`."""
    batch, heads, rows, _ = record.query.shape

    def logits(part: Part) -> Tensor:
        return chunk_logits(record, part, temperature)

    shape = batch, heads, rows, record.key.shape[2]
    return stream(shape, logits, record.query.device, chunk_rows, multiple)
