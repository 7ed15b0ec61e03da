"""TinyBERT-style attention transfer: squared error between attention logits, head by head or of their mean.

Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding" (Findings of EMNLP 2020),
eq. 7, which compares scores before the softmax. It needs equal head counts; `average` is the usual way
around that. No extra parameters.
"""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.config import AttentionMSEConfig
from shd_diffusion.losses.baselines.captured import Baseline, Captured, map_attention, running_blocks


class AttentionMSE(Baseline):
    """Mean over mapped blocks, samples, heads and pairs of tokens of (logit_student - logit_teacher)²."""

    needs_records = True

    def __init__(self, config: AttentionMSEConfig, teacher: ModelMixin, student: ModelMixin) -> None:
        super().__init__()
        self.heads = config.heads
        self.pairs = map_attention(teacher, student, config.layer_map)
        if self.heads == "average":
            return
        blocks, taught = running_blocks(student), running_blocks(teacher)
        for ours, theirs in self.pairs.items():
            if blocks[ours].heads != taught[theirs].heads:
                raise ValueError(
                    f"{ours} has {blocks[ours].heads} heads, the teacher's {theirs} {taught[theirs].heads}; "
                    "set heads: average"
                )

    def forward(self, teacher: Captured, student: Captured) -> Tensor:
        """See the class.

        Raises:
            ValueError: a pair whose token grids differ.
        """
        errors = []
        for ours, theirs in self.pairs.items():
            target, logits = (
                self._logits(teacher.records[theirs]).detach(),
                self._logits(student.records[ours]),
            )
            if logits.shape != target.shape:
                raise ValueError(
                    f"logits of {ours} are {tuple(logits.shape)}, the teacher's {tuple(target.shape)}"
                )
            masked = ~target.isfinite()
            errors.append((logits - target).masked_fill(masked, 0).square().mean())
        return torch.stack(errors).mean()

    def _logits(self, record: AttentionRecord) -> Tensor:
        logits = record.logits()
        return logits.mean(1) if self.heads == "average" else logits
