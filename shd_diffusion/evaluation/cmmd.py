"""CMMD (Jayasumana et al. 2024, arXiv 2401.09603): the MMD of CLIP embeddings, which assumes no Gaussians."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from shd_diffusion.evaluation.metric import Column, Metric, Need

SIGMA, SCALE = 10.0, 1000.0
BLOCK = 4096  # rows of a kernel matrix at once


def cmmd(generated: Tensor, reference: Tensor) -> float:
    """1,000 times the squared MMD of embeddings (N, D) and (R, D) by a Gaussian kernel of bandwidth 10.

    The biased estimate, as in the authors' code: a sample's kernel with itself counts. CLIP embeddings are of length
    1, and so are made these; those of CLIP ViT-L/14 at 336 pixels give the published metric.
    """
    first, second = (F.normalize(side.double(), dim=1) for side in (generated, reference))
    return SCALE * (_kernel(first, first) + _kernel(second, second) - 2 * _kernel(first, second))


def _kernel(first: Tensor, second: Tensor) -> float:
    """Mean of exp(-|x - y|² / 2σ²) over all pairs of unit vectors, for which |x - y|² = 2 - 2 xᵀy."""
    sums = [((rows @ second.T - 1) / SIGMA**2).exp().sum() for rows in first.split(BLOCK)]
    return float(sum(sums)) / (len(first) * len(second))


CMMD = Metric(
    "cmmd",
    lambda inputs: cmmd(inputs.features, inputs.reference),
    (Column("cmmd", "CMMD", "CMMD", "lower"),),
    needs=(Need.CLIP, Need.REFERENCE_IMAGES),
    usual=True,
)
