"""M attention maps squeezed into N."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from shd_diffusion.squeezing.coefficients import Coefficient
from shd_diffusion.squeezing.plan import Group, Plan, check_heads, check_plan, plan_merges
from shd_diffusion.squeezing.value_space import output_gram
from shd_diffusion.squeezing.weights import (
    Granularity,
    Merge,
    Stream,
    apply_weights,
    mix,
    prepare,
    squeeze_weights,
    with_weights,
)


@dataclass(frozen=True, slots=True)
class SqueezeDetails:
    """How the maps of one block were squeezed.

    Attributes:
        coefficients: (B, M - N), by row (B, M - N, Q): the share α of the first head in each merge, round
            after round. A joint merge of n heads lists the weights of all but its last.
        weights: (B, N, M), by row (B, N, M, Q): the squeezed maps are `weights @ maps`; each sums to 1.
        residual: (B, N): |sum A_h X_h - Ā sum X_h| / |sum A_h X_h| over the heads h behind a squeezed head.
    """

    coefficients: Tensor
    weights: Tensor
    residual: Tensor


@overload
def squeeze_heads(
    maps: Tensor,
    values: Tensor,
    output_weight: Tensor,
    num_heads: int,
    *,
    pairing: Literal["adjacent", "matched"] | Plan = ...,
    granularity: Granularity = ...,
    merge: Merge = ...,
    coefficient: Coefficient = ...,
    return_details: Literal[False] = ...,
) -> Tensor: ...
@overload
def squeeze_heads(
    maps: Tensor,
    values: Tensor,
    output_weight: Tensor,
    num_heads: int,
    *,
    pairing: Literal["adjacent", "matched"] | Plan = ...,
    granularity: Granularity = ...,
    merge: Merge = ...,
    coefficient: Coefficient = ...,
    return_details: Literal[True],
) -> tuple[Tensor, SqueezeDetails]: ...
@torch.no_grad()
def squeeze_heads(
    maps: Tensor,
    values: Tensor,
    output_weight: Tensor,
    num_heads: int,
    *,
    pairing: Literal["adjacent", "matched"] | Plan = "adjacent",
    granularity: Granularity = "sample",
    merge: Merge = "progressive",
    coefficient: Coefficient = "closed_form",
    return_details: bool = False,
) -> Tensor | tuple[Tensor, SqueezeDetails]:
    """Squeeze the teacher's M attention maps into the student's N (METHOD.md sections 3 and 4).

    Args:
        maps: A, (B, M, Q, K), rows that sum to 1.
        values: V, (B, M, K, d).
        output_weight: (C, M·d), as in `nn.Linear.weight` of the output projection.
        num_heads: N, from 1 to M; M returns the maps unchanged.
        pairing: `adjacent` heads merge (the paper), those `matched` on these very maps, or an explicit plan.
        granularity: one α for each `sample` and merge (the paper), or for each `row`.
        merge: `progressive`, pair by pair (the paper), or `joint`, each final group at once.
        coefficient: `closed_form` (the paper), or for ablations `mean` (1/2) or `select` (0 or 1).
        return_details: also return `SqueezeDetails`.

    Returns:
        The squeezed maps (B, N, Q, K), in float32 or better, without gradient.

    Raises:
        ValueError: head counts that cannot be squeezed, shapes that do not fit, maps or values that are not finite.
    """
    batch, heads, _, keys = maps.shape
    check_heads(heads, num_heads)
    if values.shape[:3] != (batch, heads, keys):
        raise ValueError(f"values {tuple(values.shape)} do not fit maps {tuple(maps.shape)}")
    if output_weight.shape[1] != heads * values.shape[3]:
        raise ValueError(
            f"an output weight {tuple(output_weight.shape)} does not fit {heads} heads of {values.shape[3]}"
        )
    dtype = torch.promote_types(torch.promote_types(maps.dtype, values.dtype), torch.float32)
    maps, values, output_weight = maps.to(dtype), values.to(dtype), output_weight.to(dtype)
    plan = plan_merges(heads, num_heads) if pairing == "adjacent" else pairing
    check_plan(plan, heads, num_heads)
    squeezer = prepare(plan, output_weight, heads, merge)
    weights, coefficients = squeeze_weights(lambda: [maps], values, squeezer, granularity, coefficient)
    squeezed = apply_weights(maps, weights, squeezer.groups)
    if not torch.isfinite(squeezed.sum() + weights.sum()):
        raise ValueError("attention maps or values are not finite")
    if not return_details:
        return squeezed
    residual = relative_residual(lambda: [maps], values, output_weight, weights, squeezer.groups)
    if weights.shape[-1] == 1:
        coefficients, weights = coefficients.squeeze(-1), weights.squeeze(-1)
    return squeezed, SqueezeDetails(coefficients, weights, residual)


def relative_residual(
    stream: Stream, values: Tensor, output_weight: Tensor, weights: Tensor, groups: Sequence[Group]
) -> Tensor:
    """|sum A_h X_h - Ā sum X_h| / |sum A_h X_h| over the heads h of each group, (B, N); 0 for a head alone."""
    lost = values.new_zeros(values.shape[0], len(groups))
    total = torch.zeros_like(lost)
    for index, group in enumerate(groups):
        if len(group) == 1:
            continue
        gram = output_gram(output_weight, [group], values.shape[1])[0]
        for maps, part in with_weights(stream(), weights):
            squeezed = mix(maps, part[:, index], group)
            kept = torch.cat(
                [maps[:, head] @ values[:, head] for head in group], -1
            )  # [A_h V_h], (B, rows, n·d)
            error = kept - torch.cat([squeezed @ values[:, head] for head in group], -1)
            lost[:, index] += ((error @ gram) * error).sum((-2, -1))
            total[:, index] += ((kept @ gram) * kept).sum((-2, -1))
    tiny = torch.finfo(total.dtype).tiny
    return (lost.clamp_min(0) / total.clamp_min(tiny)).sqrt()
