"""Kernel Inception Distance (Bińkowski et al. 2018, arXiv 1801.01401), unbiased even with few samples."""

from __future__ import annotations

from torch import Tensor
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from shd_diffusion.evaluation.metric import Column, Metric, MetricInputs, Need

SUBSETS = 100


def subset_size(first: int, second: int) -> int:
    """1,000, as is usual; half of the smaller set where that is less, so that subsets still differ."""
    return max(2, min(1000, first // 2, second // 2))


def kernel_distance(generated: Tensor, reference: Tensor, size: int | None = None) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the squared MMD, as torch-fidelity computes it.

    The kernel is (xᵀy / D + 1)³. Values slightly below 0 say that the two sets cannot be told apart.

    Args:
        generated: (N, D).
        reference: (R, D).
        size: images in each of the `SUBSETS` subsets; `subset_size` by default.

    Raises:
        ValueError: a subset is larger than a set.
    """
    size = subset_size(len(generated), len(reference)) if size is None else size
    distance = kid_features_to_metric(
        generated, reference, kid_subsets=SUBSETS, kid_subset_size=size, verbose=False
    )
    return distance[KEY_METRIC_KID_MEAN], distance[KEY_METRIC_KID_STD]


def _protocol(inputs: MetricInputs) -> str:
    return f"{SUBSETS} subsets of {subset_size(len(inputs.features), len(inputs.reference))}"


KID = Metric(
    "kid",
    lambda inputs: kernel_distance(inputs.features, inputs.reference),
    (Column("kid_mean", "KID", "KID", "lower", deviation="kid_std"),),
    needs=(Need.REFERENCE_IMAGES,),
    usual=True,
    protocol=_protocol,
)
