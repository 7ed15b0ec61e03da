"""MIND, the Monge Inception Distance (Berthet et al. 2026, arXiv 2605.06797): no Gaussians, and few samples suffice."""

from __future__ import annotations

import torch
from torch import Tensor

from shd_diffusion.evaluation.metric import Column, Metric, Need

DIRECTIONS, SEED = 1000, 2020  # those of torch-fidelity, for equal numbers
BLOCK = 100  # directions at once


def mind(generated: Tensor, reference: Tensor, directions: int = DIRECTIONS, seed: int = SEED) -> float:
    """3 D times the mean over random directions u of the squared Wasserstein distance of (N, D) u from (R, D) u.

    Along a line the optimal transport joins the smallest to the smallest: both sides are sorted. Of the larger set a
    random subset counts, as many as the other has. A shift of all features by v costs 3 |v|² on average over u. Subset
    and directions are drawn as torch-fidelity's version after 0.4.0 draws them, so that it has the same number but for
    its float32.

    Raises:
        ValueError: the two sets have features of different width.
    """
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(f"features of different width: {generated.shape[1]} and {reference.shape[1]}")
    generator = torch.Generator().manual_seed(seed)
    fewest = min(len(generated), len(reference))
    sides = [
        side if len(side) == fewest else side[torch.randperm(len(side), generator=generator)[:fewest]]
        for side in (generated, reference)
    ]
    lines = torch.randn(directions, generated.shape[1], generator=generator)
    lines = lines / lines.norm(dim=1, keepdim=True)
    total = 0.0
    for block in lines.double().split(BLOCK):
        first, second = ((side.double() @ block.T).sort(dim=0).values for side in sides)
        total += (first - second).square().sum().item()
    return 3 * generated.shape[1] * total / (fewest * directions)


MIND = Metric(
    "mind",
    lambda inputs: mind(inputs.features, inputs.reference),
    (Column("mind", "MIND", "MIND", "lower"),),
    needs=(Need.REFERENCE_IMAGES,),
    protocol=lambda inputs: (
        f"{DIRECTIONS} directions, {min(len(inputs.features), len(inputs.reference))} samples"
    ),
)
