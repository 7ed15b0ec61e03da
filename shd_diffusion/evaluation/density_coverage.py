"""Density and coverage (Naeem et al. 2020, arXiv 2002.09797), which outliers do not inflate."""

from __future__ import annotations

import torch
from torch import Tensor

from shd_diffusion.evaluation.metric import Column, Metric, Need
from shd_diffusion.evaluation.precision_recall import rows_at_once


def density_coverage(generated: Tensor, reference: Tensor, neighbours: int = 5) -> tuple[float, float]:
    """Density and coverage of (N, D) against (R, D).

    A ball round each reference sample reaches to its k-th neighbour. Density is how many balls a generated
    sample lies in, over k; about 1 for the real distribution, and it can exceed 1. Coverage is the share of
    balls with a generated sample in them.

    Raises:
        ValueError: no more reference samples than neighbours.
    """
    if len(reference) <= neighbours:
        raise ValueError(f"{len(reference)} reference samples have no {neighbours} neighbours each")
    hits = 0
    covered = 0
    rows = rows_at_once(len(generated), len(reference))
    for balls in reference.split(rows):
        radii = torch.cdist(balls, reference).kthvalue(neighbours + 1).values  # the nearest is itself
        inside = [(torch.cdist(balls, part) < radii[:, None]) for part in generated.split(rows)]
        hits += sum(int(part.sum()) for part in inside)
        covered += int(torch.stack([part.any(dim=1) for part in inside]).any(dim=0).sum())
    return hits / (neighbours * len(generated)), covered / len(reference)


DENSITY_COVERAGE = Metric(
    "dc",
    lambda inputs: density_coverage(inputs.features, inputs.reference),
    (
        Column("density", "Density", "Dens", "higher", ".3f"),
        Column("coverage", "Coverage", "Cov", "higher", ".3f"),
    ),
    needs=(Need.REFERENCE_IMAGES,),
)
