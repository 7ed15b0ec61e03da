"""The Fréchet distance of each class on its own: which classes a model finds hard."""

from __future__ import annotations

from torch import Tensor

from shd_diffusion.evaluation.fid import feature_statistics, frechet_distance


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
