"""M attention maps squeezed into N."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from shd_diffusion.squeezing.coefficients import Coefficient
from shd_diffusion.squeezing.map_stream import EVERYTHING, whole
from shd_diffusion.squeezing.matching import match_merges
from shd_diffusion.squeezing.merge_weights import (
    Granularity,
    Squeezer,
    mixing_weights,
    mixture,
    prepare_squeezer,
)
from shd_diffusion.squeezing.plan import Merge, Plan, check_heads, check_plan, plan_merges
from shd_diffusion.squeezing.residual import relative_residual, residual_energies


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
    squeezer: Squeezer | None = ...,
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
    squeezer: Squeezer | None = ...,
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
    squeezer: Squeezer | None = None,
    return_details: bool = False,
) -> Tensor | tuple[Tensor, SqueezeDetails]:
    """Squeeze the teacher's M attention maps into the student's N (docs/method.md sections 3 and 4).

    Args:
        maps: A, (B, M, Q, K), rows that sum to 1.
        values: V, (B, M, K, d).
        output_weight: (C, M·d), as in `nn.Linear.weight` of the output projection.
        num_heads: N, from 1 to M; M returns the maps unchanged.
        pairing: `adjacent` heads merge (the paper), those `matched` on these very maps, or an explicit plan.
        granularity: one α for each `sample` and merge (the paper), or for each `row`.
        merge: `progressive`, pair by pair (the paper), or `joint`, each final group at once.
        coefficient: `closed_form` (the paper), or for ablations `mean` (1/2) or `select` (0 or 1).
        squeezer: what `prepare_squeezer` made of the plan and the output weight of a frozen teacher, to save doing it
            again; `pairing` and `merge` are then settled.
        return_details: also return `SqueezeDetails`.

    Returns:
        The squeezed maps (B, N, Q, K), in float32 or better, without gradient.

    Raises:
        ValueError: head counts that cannot be squeezed, shapes that do not fit, numbers that are not finite.
    """
    batch, heads, _, keys = maps.shape
    check_heads(heads, num_heads)
    if values.shape[:3] != (batch, heads, keys):
        raise ValueError(f"values {tuple(values.shape)} do not fit maps {tuple(maps.shape)}")
    if output_weight.shape[1] != heads * values.shape[3]:
        raise ValueError(
            f"output weight {tuple(output_weight.shape)} does not fit values {tuple(values.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(maps.dtype, values.dtype), torch.float32)
    maps, values, output_weight = maps.to(dtype), values.to(dtype), output_weight.to(dtype)

    if squeezer is None:
        plan = plan_merges(heads, num_heads) if pairing == "adjacent" else pairing
        if plan == "matched":
            plan = match_merges(
                [(whole(maps), values)], output_weight, num_heads, granularity, merge, coefficient
            )
        assert not isinstance(plan, str)
        check_plan(plan, heads, num_heads)
        squeezer = prepare_squeezer(plan, output_weight, heads, merge)
    elif len(squeezer.groups) != num_heads:
        raise ValueError(f"the squeezer leads to {len(squeezer.groups)} heads, not to {num_heads}")

    weights, coefficients = mixing_weights(whole(maps), values, squeezer, granularity, coefficient)
    squeezed = mixture(weights, squeezer.groups)(EVERYTHING, maps)
    if not torch.compiler.is_compiling() and not torch.isfinite(squeezed.sum() + weights.sum()):
        raise ValueError("attention maps or values are not finite")
    if not return_details:
        return squeezed
    energies = residual_energies(whole(maps), values, output_weight, weights, squeezer.groups)
    if granularity == "sample" or weights.shape[-1] == 1:
        coefficients, weights = coefficients.squeeze(-1), weights.squeeze(-1)
    return squeezed, SqueezeDetails(coefficients, weights, relative_residual(energies))
