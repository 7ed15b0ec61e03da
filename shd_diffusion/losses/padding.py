"""Query rows of padding: where prompts are filled up to a length, and text attends too, they weigh nothing.

Most models hide padded keys, so that no token that counts ever sees what these rows attend to. Some attend to padding
(`TEXT_MASK`): its keys are keys then like any other, but its query rows, often nine of ten, still are no text.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shd_diffusion.attention.probe import CONTEXT
from shd_diffusion.attention.records import AttentionRecord
from shd_diffusion.losses.term import Records
from shd_diffusion.models.denoiser import Condition
from shd_diffusion.models.families import TEXT_MASK


def with_text_mask(records: Records, condition: Condition) -> dict[str, AttentionRecord]:
    """Records in which padded text does not count, where the model attends to it and only the condition tells it.

    Text has query rows in the second record of a joint block, and before the image's in a block of a single stream.
    """
    mask = condition.get(TEXT_MASK)  # (B, L)
    if mask is None:
        return dict(records)

    def marked(name: str, record: AttentionRecord) -> AttentionRecord:
        image = record.query.shape[2] - mask.shape[1]
        single = name.startswith("single_") and image > 0
        if not single and not (name.endswith(CONTEXT) and image == 0):
            return record
        counted = F.pad(mask.to(record.query.device), (0, image), value=True)
        return replace(record, counted=counted if record.counted is None else counted & record.counted)

    return {name: marked(name, record) for name, record in records.items()}


def counted_keys(record: AttentionRecord, condition: Condition) -> Tensor | None:
    """Which keys of joint attention are no padding of the text, (B, K), where the model attends to that and only the
    condition tells it; None elsewhere."""
    mask = condition.get(TEXT_MASK)
    text = record.own_keys if record.name.endswith(CONTEXT) else record.other_keys
    if mask is None or text is None or text.stop - text.start != mask.shape[1]:
        return None
    return F.pad(mask.to(record.key.device), (text.start, record.key.shape[2] - text.stop), value=True)


def alike(teacher: AttentionRecord, student: AttentionRecord) -> tuple[AttentionRecord, AttentionRecord]:
    """Both records, in which the same rows count: those that count in both, where both have as many rows."""
    known = [record.counted for record in (teacher, student) if record.counted is not None]
    if not known or teacher.query.shape[2] != student.query.shape[2]:
        return teacher, student
    counted = known[0] if len(known) == 1 else known[0] & known[1].to(known[0].device)
    return replace(teacher, counted=counted), replace(student, counted=counted.to(student.query.device))


def row_share(record: AttentionRecord, pool: int, dtype: torch.dtype) -> Tensor:
    """Weight of a query row in its sample's mean, (B,): 1 over those that count, `pool` times that in a pooled map."""
    samples, _, rows, _ = record.query.shape
    if record.counted is None:
        return record.query.new_full((samples,), pool / rows, dtype=dtype)
    return pool / record.counted.sum(1).clamp_min(1).to(dtype)


def estimates_all(record: AttentionRecord, drawn: AttentionRecord, dtype: torch.dtype) -> Tensor:
    """Factor (B, 1) by which the mean over the drawn rows is an unbiased estimate of that over all rows.

    It is the number of drawn rows that count over the expected number; where few count, a draw may have none of them.
    """
    if record.counted is None or drawn.counted is None:
        return record.query.new_ones(1, 1, dtype=dtype)
    share = drawn.query.shape[2] / record.query.shape[2]
    expected = share * record.counted.sum(1, keepdim=True).to(dtype)
    return drawn.counted.sum(1, keepdim=True) / expected.clamp_min(share)


def mean_of_rows(values: Tensor, counted: Tensor | None) -> Tensor:
    """Mean over the rows that count, (B, ...) of values (B, ..., Q), given counted (B, Q)."""
    if counted is None:
        return values.mean(-1)
    weight = counted.view(len(counted), *[1] * (values.ndim - 2), -1)
    return values.masked_fill(~weight, 0).sum(-1) / weight.sum(-1).clamp_min(1)
