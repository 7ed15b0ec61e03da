"""The maps that a student is to learn: a teacher's, squeezed, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.streaming import Pool, chunk_logits, pooled
from shd_diffusion.squeezing.chunks import Chunk, MapStream, Workspace, stream
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
        chunk_rows, workspace: see `stream`.
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
    workspace: Workspace | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The teacher heads behind the map that each student head learns."""
        groups = self.squeezer.groups
        return groups if self.order is None else tuple(groups[head] for head in self.order)

    def chunks(self) -> Iterator[Chunk]:
        """The target maps (samples, N, rows of the pooled maps, K), in float32 or better."""
        aligned = self.chunk_rows, self.pool[0]
        if self.source is self.record:
            maps = source = map_stream(self.record, 1.0, *aligned, self.workspace)
        else:
            maps = map_stream(self.record, 1.0, *aligned)
            source = map_stream(self.source, 1.0, self.chunk_rows, 1, self.workspace)
        mix = mixture(self.weights(source)[0], self.groups)
        if self.temperature != 1:
            maps = map_stream(self.record, self.temperature, *aligned)
        for samples, rows, chunk in maps.walk():
            target = pooled(mix(samples, rows, chunk), self.pool)
            yield samples, slice(rows.start // self.pool[0], rows.stop // self.pool[0]), target

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
    workspace: Workspace | None = None,
) -> MapStream:
    """The maps of a record at a temperature, chunk by chunk; see `stream`."""
    batch, heads, rows, _ = record.query.shape

    def logits(samples: slice, part: slice) -> Tensor:
        return chunk_logits(record, samples, part, temperature)

    shape = batch, heads, rows, record.key.shape[2]
    return stream(shape, logits, record.query.device, chunk_rows, multiple, workspace)
