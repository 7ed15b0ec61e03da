"""Inception Score (Salimans et al. 2016, arXiv 1606.03498): confident images of many classes."""

from __future__ import annotations

from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from shd_diffusion.evaluation.metric import Column, Metric, Need

SPLITS = 10


def inception_score(logits: Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Mean and standard deviation over splits of exp E KL(p(y|x) ‖ p(y)), as torch-fidelity computes it.

    Args:
        logits: (N, classes). The images are shuffled from a fixed seed, as sampled labels often come in
            order.
        splits: parts that are scored on their own.

    Raises:
        ValueError: fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images are too few for {splits} splits")
    score = isc_features_to_metric(logits, splits)
    return score[KEY_METRIC_ISC_MEAN], score[KEY_METRIC_ISC_STD]


INCEPTION_SCORE = Metric(
    "is",
    lambda inputs: inception_score(inputs.roles["logits"]),
    (Column("inception_score_mean", "IS", "IS", "higher", ".2f", "inception_score_std"),),
    needs=(Need.LOGITS,),
    usual=True,
    protocol=lambda _: f"{SPLITS} splits, shuffled",
)
