"""Query rows of padding: what shares a batch with a longer prompt is filled up with them, and they weigh nothing.

Where attention is joint, or its tokens are text and image at once, padded text has query rows too. Whatever they attend
to, no token that counts ever sees.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shd_diffusion.attention.kernels import MASKED
from shd_diffusion.attention.records import AttentionRecord, Index


def alike(teacher: AttentionRecord, student: AttentionRecord) -> tuple[AttentionRecord, AttentionRecord]:
    """Both records, in which the same rows count: those that count in both, where both have as many rows."""
    known = [record.counted for record in (teacher, student) if record.counted is not None]
    if not known or teacher.query.shape[2] != student.query.shape[2]:
        return teacher, student
    counted = known[0] if len(known) == 1 else known[0] & known[1].to(known[0].device)
    return replace(teacher, counted=counted), replace(student, counted=counted.to(student.query.device))


def comparable_logits(
    record: AttentionRecord, temperature: float = 1.0, samples: Index | None = None, rows: Index | None = None
) -> Tensor:
    """As `record.logits`; rows that do not count attend to the first key alone, in every head of every model.

    So they differ nowhere: no coefficient and no divergence has anything from them.
    """
    logits = record.logits(temperature, samples, rows)
    counted = record.some_counted(samples, rows)
    if counted is None:
        return logits
    first = torch.full_like(logits[0, 0, 0], MASKED)
    first[0] = 0
    return torch.where(counted[:, None, :, None], logits, first)


def row_share(record: AttentionRecord, pool: int, dtype: torch.dtype) -> Tensor:
    """What each row counts in its sample's mean over the rows that do, (B,); so many make one of a pooled map."""
    samples, _, rows, _ = record.query.shape
    count = record.query.new_full((samples,), rows) if record.counted is None else record.counted.sum(1)
    return pool / count.clamp_min(1).to(dtype)


def mean_of_rows(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean over the rows that count, (B, ...) of values (B, ..., Q), given counted (B, Q)."""
    if counted is None:
        return values.mean(-1)
    weight = counted.view(len(counted), *[1] * (values.ndim - 2), -1)
    return values.masked_fill(~weight, 0).sum(-1) / weight.sum(-1).clamp_min(1)
