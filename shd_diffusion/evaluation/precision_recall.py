"""Precision and recall by k nearest neighbours (Kynkäänniemi et al. 2019, arXiv 1904.06991).

Each set spans a manifold: the union of balls round its samples that reach to their k-th neighbour.
Precision is the share of generated samples on the reference's manifold, recall the share of reference
samples on theirs.
"""

from __future__ import annotations

from torch import Tensor
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from shd_diffusion.evaluation.metric import Column, Metric, Need

NEIGHBOURS = 3
DISTANCES = 2**29  # held at once


def rows_at_once(*counts: int) -> int:
    """Of how many samples the distances from all of the others are held: usually 10,000, of large sets fewer."""
    return max(1, min(10_000, DISTANCES // max(counts)))


def precision_recall(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """Precision and recall of (N, D) against (R, D), as torch-fidelity computes them.

    Raises:
        ValueError: no more samples than neighbours.
    """
    fewest = min(len(generated), len(reference))
    if fewest <= NEIGHBOURS:
        raise ValueError(f"{fewest} samples have no {NEIGHBOURS} neighbours each")
    found = prc_features_to_metric(
        generated,
        reference,
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=rows_at_once(len(generated), len(reference)),
        save_cpu_ram=True,
        verbose=False,
    )
    return found[KEY_METRIC_PRECISION], found[KEY_METRIC_RECALL]


PRECISION_RECALL = Metric(
    "prc",
    lambda inputs: precision_recall(inputs.features, inputs.reference),
    (
        Column("precision", "Precision", "Prec", "higher", ".3f"),
        Column("recall", "Recall", "Rec", "higher", ".3f"),
    ),
    needs=(Need.REFERENCE_IMAGES,),
    usual=True,
    protocol=lambda _: f"{NEIGHBOURS} nearest neighbours",
)
