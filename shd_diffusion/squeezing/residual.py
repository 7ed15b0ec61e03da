"""What the squeezed maps lose of the block's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shd_diffusion.squeezing.plan import Group
from shd_diffusion.squeezing.value_space import output_gram
from shd_diffusion.squeezing.weights import Stream, mix, with_weights


def residual_energies(
    stream: Stream, values: Tensor, output_weight: Tensor, weights: Tensor, groups: Sequence[Group]
) -> tuple[Tensor, Tensor]:
    """|sum A_h X_h - Ā sum X_h|² and |sum A_h X_h|² over the heads h behind each squeezed head, (B, N) each."""
    lost = values.new_zeros(values.shape[0], len(groups))
    total = torch.zeros_like(lost)
    for index, group in enumerate(groups):
        gram = output_gram(output_weight, [group], values.shape[1])[0]
        for maps, part in with_weights(stream(), weights):
            squeezed = mix(maps, part[:, index : index + 1], [group])[:, 0]
            kept = torch.cat(
                [maps[:, head] @ values[:, head] for head in group], -1
            )  # [A_h V_h], (B, rows, n·d)
            error = kept - torch.cat([squeezed @ values[:, head] for head in group], -1)
            lost[:, index] += ((error @ gram) * error).sum((-2, -1)).clamp_min(0)
            total[:, index] += ((kept @ gram) * kept).sum((-2, -1)).clamp_min(0)
    return lost, total
