"""The Fréchet distance of each class on its own: which classes a model finds hard."""

from __future__ import annotations

from torch import Tensor

from shd_diffusion.evaluation.frechet import feature_statistics, frechet_distance
from shd_diffusion.evaluation.metric import Metric, MetricInputs, Need


def per_class_distance(
    generated: Tensor, labels: Tensor, reference: Tensor, reference_labels: Tensor
) -> dict[int, float]:
    """Fréchet distance of each class that has 2 samples or more in both sets.

    Args:
        generated: (N, D), of the classes `labels` (N,).
        reference: (R, D), of the classes `reference_labels` (R,).
    """
    distances = {}
    for label in labels.unique().tolist():
        sides = generated[labels == label], reference[reference_labels == label]
        if min(map(len, sides)) >= 2:
            distances[label] = frechet_distance(*map(feature_statistics, sides))
    return distances


def _compute(inputs: MetricInputs) -> dict[str, dict[str, float]]:
    sides = inputs.features, inputs.labels, inputs.reference, inputs.reference_labels
    return {"per_class_fid": {str(label): distance for label, distance in per_class_distance(*sides).items()}}


PER_CLASS = Metric(
    "per-class",
    _compute,
    needs=(Need.LABELS, Need.REFERENCE_IMAGES, Need.REFERENCE_LABELS),
    caution=lambda _: "per-class FIDs are of few images each: compare them between models, not with the FID",
)
