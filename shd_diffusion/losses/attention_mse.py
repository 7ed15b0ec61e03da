"""TinyBERT-style attention transfer: squared error between attention logits, head by head or of their mean.

Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding" (Findings of EMNLP 2020),
eq. 7, which compares scores before the softmax. It needs equal head counts; `average` is the usual way
around that. No extra parameters.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.attention.kernels import MASKED
from shd_diffusion.losses.padding import alike
from shd_diffusion.losses.term import MappedTermConfig, StepOutputs, Term, TermConfig, map_traces
from shd_diffusion.models.trace import Trace


class AttentionMSEConfig(MappedTermConfig):
    """Squared error between attention logits: of `equal` head counts head by head, or of the heads' `average`."""

    heads: Literal["equal", "average"] = "average"


class AttentionMSE(Term):
    """Mean over mapped blocks, samples, heads and pairs of tokens of (logit_student - logit_teacher)².

    Of pairs that the mask leaves, in query rows that count.
    """

    Config: ClassVar[type[TermConfig]] = AttentionMSEConfig
    captures = "records"
    config: AttentionMSEConfig

    def __init__(
        self, config: AttentionMSEConfig, student: Trace, teacher: Trace | None, seed: int = 0
    ) -> None:
        super().__init__(config, student, teacher, seed)
        self.pairs = map_traces(student, teacher, config)
        assert teacher is not None
        for name, by in self.pairs.items():
            heads = student.records[name].heads, teacher.records[by].heads
            if config.heads == "equal" and heads[0] != heads[1]:
                raise ValueError(
                    f"{name} has {heads[0]} heads, the teacher's {by} {heads[1]}; set heads: average"
                )
            shapes = [tuple(self._logits(r).shape) for r in (student.records[name], teacher.records[by])]
            if shapes[0] != shapes[1]:
                raise ValueError(f"logits of {name} are {shapes[0]}, the teacher's {shapes[1]}")

    def forward(self, outputs: StepOutputs) -> Tensor:
        errors = []
        for name, by in self.pairs.items():
            teacher, student = alike(outputs.teacher.records[by], outputs.student.records[name])
            squared = (self._logits(student) - self._logits(teacher).detach()).square()
            errors.append(_mean_of_seen(squared, student))
        return torch.stack(errors).mean()

    def _logits(self, record: AttentionRecord) -> Tensor:
        logits = record.logits()  # (B, H, Q, K)
        return logits.mean(1) if self.config.heads == "average" else logits


def _mean_of_seen(squared: Tensor, record: AttentionRecord) -> Tensor:
    """Mean over samples of each one's mean over heads and the pairs (query row, key) that count."""
    if record.mask is None and record.counted is None:
        return squared.mean()
    seen = squared.new_ones(len(squared), 1, 1, 1, dtype=torch.bool)
    if record.mask is not None:
        seen = record.mask > MASKED
    if record.counted is not None:
        seen = seen & record.counted[:, None, :, None]
    seen = (seen if squared.ndim == 4 else seen.any(1)).expand_as(squared)
    sums = squared.masked_fill(~seen, 0).flatten(1).sum(1)
    return (sums / seen.flatten(1).sum(1).clamp_min(1)).mean()
