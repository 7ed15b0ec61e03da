"""The cross-attention projector: each of the teacher's tokens asks all of the student's for its feature.

Source: Fan et al., "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers" (NeurIPS 2024, arXiv
2411.06786), section 3.1: the projector of pairs of different architectures. Learned queries, one a teacher's token,
attend to the student's tokens with a learned position each. ScaleKD's other two parts, features in the frequency
domain and the teacher's own later blocks, are not here. Extra parameters for each pair: N · (C_teacher + C_student)
for queries and positions, and 2 · (C_teacher + C_student) · C_teacher + 4 · C_teacher of the attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CrossAttentionProjector(nn.Module):
    """From a student's tokens (B, N, C_student) to (B, N, C_teacher), N as it was built."""

    def __init__(self, student_width: int, teacher_width: int, tokens: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, teacher_width))
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, student_width))
        self.attention = nn.MultiheadAttention(
            teacher_width, num_heads=1, kdim=student_width, vdim=student_width, batch_first=True
        )

    def forward(self, features: Tensor) -> Tensor:
        """See the class.

        Raises:
            ValueError: another number of tokens.
        """
        if features.shape[1] != len(self.positions):
            raise ValueError(
                f"a projector for {len(self.positions)} tokens cannot take {features.shape[1]}; set `projector: linear`"
            )
        keys = features + self.positions
        found, _ = self.attention(self.queries.expand(len(keys), -1, -1), keys, keys, need_weights=False)
        return found
