"""MiniLMv2: relations among queries, among keys and among values, over heads of their own number.

Source: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
Transformers" (Findings of ACL 2021, arXiv 2012.15828), eq. 6 to 8: the vectors of all heads are put side by side and
cut into A relation heads of width d_r; R = softmax(X Xᵀ / √d_r) for X in {Q, K, V}; KL(R_teacher || R_student) is
averaged over relation heads and tokens and summed over the three. Head numbers and widths of the two models need not
agree, so it is the other way around a head mismatch that needs no projector. The paper takes one block, here it is
every mapped one (`layer_map`, `after`). Vectors are as the kernel gets them, with rotary embeddings. No extra
parameters.

Relations are maps: they are had chunk by chunk, and token grids are brought together, as SHD does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from shd_diffusion.attention.kernels import MASKED
from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.divergence import forward_kl
from shd_diffusion.losses.map_divergence import PlainMaps, map_divergence
from shd_diffusion.losses.padding import alike, counted_keys
from shd_diffusion.losses.term import MappedTermConfig, StepOutputs, Term, TermConfig, map_traces
from shd_diffusion.losses.token_grid import common_grid, on_grid
from shd_diffusion.models.denoiser import Condition
from shd_diffusion.models.trace import Trace

Relation = Literal["query", "key", "value"]


class MiniLMConfig(MappedTermConfig):
    """Relations among queries, keys and values.

    Attributes:
        relations: which of the three count.
        relation_heads: A, a divisor of both models' widths (heads times their width); None for the largest common
            divisor that is no more than the teacher's heads.
    """

    relations: list[Relation] = Field(["query", "key", "value"], min_length=1)
    relation_heads: int | None = Field(None, ge=1)


class MiniLM(Term):
    """Σ over relations of the mean over blocks, samples, relation heads and tokens of KL(R_teacher || R_student)."""

    Config: ClassVar[type[TermConfig]] = MiniLMConfig
    captures = "records"
    config: MiniLMConfig

    def __init__(self, config: MiniLMConfig, student: Trace, teacher: Trace | None, seed: int = 0) -> None:
        super().__init__(config, student, teacher, seed)
        self.pairs = map_traces(student, teacher, config)
        assert teacher is not None
        for relation in config.relations:
            for name, by in self._pairs_of(relation):
                records = teacher.records[by], student.records[name]
                try:
                    common_grid(*self._both(relation, *records), student.shape[-2:])
                except ValueError as error:
                    raise ValueError(f"block {name}: {error}") from error

    def forward(self, outputs: StepOutputs) -> Tensor:
        size = outputs.batch.clean.shape[-2:]
        total = []
        for relation in self.config.relations:
            blocks = []
            for name, by in self._pairs_of(relation):
                records = outputs.teacher.records[by].detached(), outputs.student.records[name]
                teacher, student = self._both(relation, *alike(*records), outputs.batch.condition)
                of_teacher, of_student = common_grid(teacher, student, size)
                targets = PlainMaps(*on_grid(teacher, of_teacher, None))
                student, pool = on_grid(student, of_student, None)
                everything = slice(0, len(student.query))
                found = map_divergence(student, [(everything, targets)], forward_kl, pool=pool)
                blocks.append(found.mean())
            total.append(torch.stack(blocks).mean())
        return torch.stack(total).sum()

    def _pairs_of(self, relation: Relation) -> Iterator[tuple[str, str]]:
        """Pairs of records; those of one joint block have the same keys and values, which count once."""
        seen: set[str] = set()
        for name, by in self.pairs.items():
            block, _, stream = name.partition(":")
            shared = relation != "query" and stream == "context"
            if not (shared and block in seen):
                yield name, by
            seen.add(block)

    def _both(
        self,
        relation: Relation,
        teacher: AttentionRecord,
        student: AttentionRecord,
        condition: Condition | None = None,
    ) -> tuple[AttentionRecord, AttentionRecord]:
        """The records of a relation, whose queries and keys are the same vectors."""
        widths = [getattr(r, relation).shape[1] * getattr(r, relation).shape[3] for r in (teacher, student)]
        common = gcd(*widths)
        heads = self.config.relation_heads
        if heads is None:
            heads = max(n for n in range(1, min(common, teacher.heads) + 1) if common % n == 0)
        if common % heads:
            raise ValueError(
                f"{heads} relation heads do not divide the widths {widths[0]} and {widths[1]} of teacher and student; "
                f"set `relation_heads` to a divisor of {common}"
            )
        both = (relation_record(record, relation, heads, condition or {}) for record in (teacher, student))
        return next(both), next(both)


def relation_record(
    record: AttentionRecord, relation: Relation, heads: int, condition: Condition
) -> AttentionRecord:
    """A record whose maps are the relations R among its queries, keys or values, (B, heads, N, N)."""
    vectors: Tensor = getattr(record, relation)  # (B, H, N, d)
    vectors = vectors.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)  # (B, A, N, d_r)
    counted = record.counted if relation == "query" else _seen_keys(record, condition)
    mask = None
    if counted is not None:
        mask = torch.zeros_like(counted, dtype=torch.float32).masked_fill(~counted, MASKED)[:, None, None]
    return replace(
        record,
        kind="joint" if record.kind == "joint" and relation != "query" else "self",
        query=vectors,
        key=vectors,
        scale=vectors.shape[-1] ** -0.5,
        mask=mask,
        counted=counted,
    )


def _seen_keys(record: AttentionRecord, condition: Condition) -> Tensor | None:
    """Which keys are of tokens that count, and which any query sees, (B, K); None where all are."""
    samples, _, rows, _ = record.query.shape
    if record.counted is not None and rows == record.key.shape[2]:
        return record.counted
    if record.mask is None:
        return counted_keys(record, condition)
    return (record.mask > MASKED).flatten(1, 2).any(1).expand(samples, -1)
