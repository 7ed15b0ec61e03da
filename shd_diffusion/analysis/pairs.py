"""How different two heads are, and what that says about α.

With the notation of docs/method.md section 3, α* - 1/2 = (|D X_p|² - |D X_q|²) / (2 |D S|²): the coefficient leaves
1/2 exactly as far as one head carries more than the other of what the two maps disagree about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shd_diffusion.attention import AttentionRecord


@dataclass(frozen=True, slots=True)
class PairDifferences:
    """Of P pairs of heads in B samples, (B, P) each.

    Attributes:
        total_variation: of their maps, |A_p - A_q|₁ / 2, mean over the query rows; from 0 to 1.
        cosine: of what they write, <A_p X_p, A_q X_q> / (|A_p X_p| |A_q X_q|).
        strength: |D X_p| / |D X_q|; 1 where the maps are the same.
        saved: share of the squared error of α = 1/2 that the closed form saves, from 0 to 1.
    """

    total_variation: Tensor
    cosine: Tensor
    strength: Tensor
    saved: Tensor


def total_variation(maps: Tensor) -> Tensor:
    """Mean total variation between the maps of all heads, (B, M, Q, K) to (B, M, M)."""
    return torch.stack(
        [(maps - maps[:, [head]]).abs().sum(-1).mean(-1) / 2 for head in range(maps.shape[1])], 1
    )


def compare_pairs(record: AttentionRecord, pairs: Sequence[tuple[int, int]]) -> PairDifferences:
    """Compare heads in the output's own space."""
    maps = record.maps()
    weight = record.output_weight.T.unflatten(0, (record.heads, -1)).to(maps.dtype)  # W, (M, d, C)
    contributions = record.value.to(maps.dtype) @ weight  # X, (B, M, K, C)
    first, second = ([pair[place] for pair in pairs] for place in (0, 1))
    written = [(maps[:, heads] @ contributions[:, heads]).flatten(2) for heads in (first, second)]
    difference = maps[:, first] - maps[:, second]
    of_first, of_second = ((difference @ contributions[:, heads]).flatten(2) for heads in (first, second))
    energies = of_first.square().sum(-1), of_second.square().sum(-1)
    both, apart = (of_first + of_second).square().sum(-1), (of_first - of_second).square().sum(-1)
    tiny = torch.finfo(maps.dtype).tiny
    # E(1/2) = |D(X_p - X_q)|² / 4, E(α) = E(1/2) - (α - 1/2)² |D S|² at the unclipped α, and least at α = 0 or 1
    # where it is clipped.
    alpha = (0.5 + (energies[0] - energies[1]) / (2 * both).clamp_min(tiny)).clamp(0, 1)
    error = ((1 - alpha)[..., None] * of_first - alpha[..., None] * of_second).square().sum(-1)
    return PairDifferences(
        total_variation=difference.abs().sum(-1).mean(-1) / 2,
        cosine=torch.cosine_similarity(written[0], written[1], dim=-1),
        strength=((energies[0] + tiny) / (energies[1] + tiny)).sqrt(),
        saved=torch.where(apart > 0, 1 - error / (apart / 4).clamp_min(tiny), 0.0),
    )
