"""Attention-output matching: what the attention module adds to the tokens, through a linear projector.

Source: feature distillation as in features.py, moved to the outputs O of docs/method.md section 2, which are what
squeezing preserves. Extra parameters: C_student · C_teacher + C_teacher for each pair of outputs.
"""

from __future__ import annotations

from shd_diffusion.losses.features import FeatureDistillation


class AttentionOutput(FeatureDistillation):
    """Mean over pairs of ||P(O_student) - O_teacher||², averaged over samples, tokens and channels."""

    def module(self, attention: str) -> str:
        return attention.partition(":")[0]
