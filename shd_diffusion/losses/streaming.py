"""The divergence of a student's maps from their targets, without ever holding all of the maps.

The seam for other backends: a fused kernel may replace `map_divergence` behind the same signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shd_diffusion.losses.divergence import DivergenceFunction

Targets: TypeAlias = Callable[[slice], Iterator[tuple[slice, Tensor]]]
"""For a slice of samples: slices of query rows, in order, with their target maps (samples, H, rows, K)."""


def map_divergence(
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    targets: Targets,
    divergence: DivergenceFunction,
    samples_at_once: int = 1,
) -> Tensor:
    """Mean divergence over the query rows of softmax(scale · q kᵀ + mask) from its target maps.

    Maps exist for one chunk at a time. The gradient is linear in each head's upstream gradient, so it is formed
    in the same pass, while a chunk's maps are at hand: (B, H, Q, d) and (B, H, K, d) wait for the backward pass.

    Args:
        query: (B, H, Q, d); the gradient goes to it and to the key.
        key: (B, H, K, d).
        scale: factor on the logits, the temperature's 1/τ included.
        mask: added to the logits as it is, or True where attention is allowed; broadcastable to (B, H, Q, K).
        targets: the maps to learn, chunk by chunk.
        divergence: from `DIVERGENCES`.
        samples_at_once: how many samples a slice takes.

    Returns:
        (B, H), float32 or better.
    """
    return _MapDivergence.apply(query, key, scale, mask, targets, divergence, samples_at_once)


class _MapDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        scale: float,
        mask: Tensor | None,
        targets: Targets,
        divergence: DivergenceFunction,
        samples_at_once: int,
    ) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        batch, heads, rows = query.shape[:3]
        needed = any(ctx.needs_input_grad[:2])
        values = query.new_zeros((batch, heads), dtype=dtype)
        query_gradient = torch.empty_like(query, dtype=dtype) if needed else None
        key_gradient = torch.zeros_like(key, dtype=dtype) if needed else None
        for start in range(0, batch, samples_at_once):
            samples = slice(start, start + samples_at_once)
            k = key[samples].to(dtype)
            for part, target in targets(samples):
                q = query[samples, :, part].to(dtype)
                logits = masked(q @ k.mT * scale, mask, samples, part)
                log_student = logits.log_softmax(-1)
                if mask is not None:  # 0 · log 0 = 0
                    log_student.clamp_min_(torch.finfo(dtype).min)
                value, gradient = divergence(target, log_student)
                values[samples] += value.sum(-1)
                if query_gradient is not None and key_gradient is not None:
                    query_gradient[samples, :, part] = gradient @ k
                    key_gradient[samples] += gradient.mT @ q
        if query_gradient is not None and key_gradient is not None:
            ctx.save_for_backward(query_gradient.mul_(scale / rows), key_gradient.mul_(scale / rows))
            ctx.dtypes = query.dtype, key.dtype
        return values / rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query_gradient, key_gradient = ctx.saved_tensors
        by_head = upstream[:, :, None, None]
        query_dtype, key_dtype = ctx.dtypes
        gradients = (query_gradient * by_head).to(query_dtype), (key_gradient * by_head).to(key_dtype)
        return *gradients, None, None, None, None, None


def masked(logits: Tensor, mask: Tensor | None, samples: slice, rows: slice) -> Tensor:
    """Logits (samples, H, rows, K) under the part of a mask (broadcastable to (B, H, Q, K)) that is theirs."""
    if mask is None:
        return logits
    part = mask.expand(*(1,) * (4 - mask.dim()), *mask.shape)
    part = part[samples] if part.shape[0] > 1 else part
    part = part[:, :, rows] if part.shape[2] > 1 else part
    return logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
