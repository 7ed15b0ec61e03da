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
from shd_diffusion.losses.term import MappedTermConfig, StepOutputs, Term, TermConfig, map_traces
from shd_diffusion.models.trace import Trace


class AttentionMSEConfig(MappedTermConfig):
    """Squared error between attention logits: of `equal` head counts head by head, or of the heads' `average`."""

    heads: Literal["equal", "average"] = "average"


class AttentionMSE(Term):
    """Mean over mapped blocks, samples, heads and pairs of tokens of (logit_student - logit_teacher)²."""

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
            target = self._logits(outputs.teacher.records[by]).detach()
            logits = self._logits(outputs.student.records[name])
            masked = ~target.isfinite()
            errors.append((logits - target).masked_fill(masked, 0).square().mean())
        return torch.stack(errors).mean()

    def _logits(self, record: AttentionRecord) -> Tensor:
        logits = record.logits()  # (B, H, Q, K)
        return logits.mean(1) if self.config.heads == "average" else logits
