"""Inception Score (Salimans et al. 2016, arXiv 1606.03498): confident images of many classes."""

from __future__ import annotations

from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
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
