"""A block of random weights, float64."""

from __future__ import annotations

import torch

from shd_diffusion.attention import AttentionRecord


def random_record(samples: int = 3, heads: int = 6, seed: int = 0) -> AttentionRecord:
    """9 tokens, heads of width 4, some of which are far stronger than others."""
    source = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(samples, heads, 9, 4, generator=source, dtype=torch.float64) for _ in range(3)
    )
    strengths = torch.tensor([1.0, 3.0, 1.0, 0.1, 1.0, 1.0], dtype=torch.float64)[:heads]
    weight = torch.randn(24, heads * 4, generator=source, dtype=torch.float64)
    weight *= strengths.repeat_interleave(4)
    return AttentionRecord("block", "self", query, key, value, weight, scale=0.9)
