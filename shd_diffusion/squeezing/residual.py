"""What the squeezed maps lose of the block's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shd_diffusion.squeezing.map_stream import MapStream
from shd_diffusion.squeezing.merge_weights import mixture
from shd_diffusion.squeezing.plan import Group
from shd_diffusion.squeezing.value_space import output_gram


def residual_energies(
    maps: MapStream, values: Tensor, output_weight: Tensor, weights: Tensor, groups: Sequence[Group]
) -> tuple[Tensor, Tensor]:
    """|sum A_h X_h - Ā sum X_h|² and |sum A_h X_h|² over the heads h behind each squeezed head, (B, N) each."""
    lost = values.new_zeros(values.shape[0], len(groups))
    total = torch.zeros_like(lost)
    for index, group in enumerate(groups):
        gram = output_gram(output_weight, [group], values.shape[1])[0]
        squeezed = mixture(weights[:, index : index + 1], [group])
        own = values[:, list(group)]
        for part, chunk in maps.walk():
            samples, _ = part
            # [A_h V_h], (samples, rows, n·d)
            kept = torch.cat((chunk[:, list(group)] @ own[samples]).unbind(1), -1)
            error = kept - torch.cat((squeezed(part, chunk) @ own[samples]).unbind(1), -1)
            lost[samples, index] += ((error @ gram) * error).sum((-2, -1)).clamp_min(0)
            total[samples, index] += ((kept @ gram) * kept).sum((-2, -1)).clamp_min(0)
    return lost, total


def relative_residual(energies: tuple[Tensor, Tensor]) -> Tensor:
    """|sum A_h X_h - Ā sum X_h| / |sum A_h X_h|, (B, N)."""
    lost, total = energies
    return (lost / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt()
