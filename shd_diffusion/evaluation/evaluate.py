"""The figures of a set of images against a reference, with the protocol that they were computed under."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.data import ReferenceImages
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.classifiers import RECIPES
from shd_diffusion.evaluation.density_coverage import density_coverage
from shd_diffusion.evaluation.extractors import Extractor, load_extractor
from shd_diffusion.evaluation.features import extract_features
from shd_diffusion.evaluation.fid import Statistics, feature_statistics, frechet_distance
from shd_diffusion.evaluation.images import open_images, tensor_images
from shd_diffusion.evaluation.inception_score import inception_score
from shd_diffusion.evaluation.kid import SUBSETS, kernel_distance, subset_size
from shd_diffusion.evaluation.nearest import write_nearest
from shd_diffusion.evaluation.per_class import per_class_distance
from shd_diffusion.evaluation.precision_recall import NEIGHBOURS, precision_recall, precision_recall_adm
from shd_diffusion.evaluation.references import Reference, open_reference
from shd_diffusion.evaluation.uncertainty import bootstrap_interval, fid_infinity
from shd_diffusion.processes import processes

USUAL = ("fid", "sfid", "is", "kid", "prc")
"""Computed, where extractor and reference allow, if the config names no metrics."""

FEWEST_IMAGES = 10  # one for each split of the Inception Score


def evaluate_run(
    images: Path | Tensor,
    reference: str | Path | Tensor | ReferenceImages,
    config: EvaluateConfig,
    labels: Sequence[int] | None = None,
    protocol: dict[str, Any] | None = None,
    nearest: Path | None = None,
) -> dict[str, Any]:
    """The figures of images against a reference: what `evaluation/metrics.json` holds.

    Args:
        images: 8-bit images (N, 3, H, W), a folder of image files, or an .npz of the ADM suite.
        reference: see `open_reference`; `config.reference` goes before it.
        config: extractor, metrics, resize filter.
        labels: the class that was asked for, image by image. With a classifier as extractor
            `label_accuracy` is the share of images that it recognises as asked for.
        protocol: how the images were made (steps, scheduler, guidance, seed, ...); kept beside the figures.
        nearest: where to write the real images that some of these resemble most, see `write_nearest`.

    Raises:
        UserError: images, reference or weights that cannot be read, or a metric that they do not allow.
    """
    generated = tensor_images(images, "images") if isinstance(images, Tensor) else open_images(images)
    if len(generated) < FEWEST_IMAGES:
        raise UserError(
            f"{generated.name(0)}: {len(generated)} images are too few; sample {FEWEST_IMAGES} or more"
        )
    if labels is not None and len(labels) != len(generated):
        raise UserError(
            f"{generated.name(0)}: {len(labels)} labels for {len(generated)} images; sample them anew"
        )
    _, height, width = generated[0].shape
    extractor = load_extractor(config.extractor, config.extractor_weights)
    real = open_reference(
        config.reference or reference, extractor, config.batch_size, config.resize, min(height, width)
    )
    if real.features is not None and len(real.features) < FEWEST_IMAGES:
        raise UserError(
            f"{real.source}: {len(real.features)} reference images are too few; give {FEWEST_IMAGES} or more"
        )
    classes = torch.tensor(labels) if labels is not None else generated.labels
    metrics = choose_metrics(config, extractor, real, classes)
    found = extract_features(generated, extractor, config.batch_size, "images")
    for role, statistics in real.statistics.items():
        if len(statistics.mean) != found[role].shape[1]:
            raise UserError(
                f"{real.source}: statistics of {len(statistics.mean)} features, but `{extractor.name}` has "
                f"{found[role].shape[1]} {role}; give those of the same extractor, or the images"
            )
    if nearest is not None and processes().is_main_process:
        write_nearest(nearest, generated, found["features"], classes, real)

    figures: dict[str, Any] = {}
    for metric in metrics:
        figures |= _compute(metric, found, real, classes)
    if config.bootstrap:
        figures |= _intervals(figures, found, real, config.bootstrap)
    if classes is not None and config.extractor in RECIPES:
        figures["label_accuracy"] = (found["logits"].argmax(dim=1) == classes).double().mean().item()
    size = f"{width}×{height}"
    return figures | {
        "protocol": {**(protocol or {}), **_protocol(config, extractor, found, real, size)},
        "warnings": _warnings(metrics, found, real, size),
    }


def choose_metrics(
    config: EvaluateConfig, extractor: Extractor, reference: Reference, classes: Tensor | None
) -> list[str]:
    """The metrics to compute.

    Raises:
        UserError: one that was asked for cannot be computed.
    """
    lacking = {
        "sfid": None
        if extractor.has_spatial and "spatial" in reference.statistics
        else "spatial Inception features",
        "is": None if extractor.has_logits else "an extractor with logits",
        "kid": None if reference.features is not None else "reference images, not only their statistics",
        "per-class": None if classes is not None and reference.labels is not None else "labels on both sides",
    }
    lacking |= dict.fromkeys(("prc", "prc-adm", "dc"), lacking["kid"])
    if config.metrics is None:
        return [metric for metric in USUAL if lacking.get(metric) is None]
    for metric in config.metrics:
        if need := lacking.get(metric):
            raise UserError(
                f"evaluate.metrics: `{metric}` needs {need}; leave it out or give another reference"
            )
    return list(config.metrics)


def _compute(
    metric: str, found: dict[str, Tensor], reference: Reference, classes: Tensor | None
) -> dict[str, Any]:
    """One metric as the entries of the result."""
    features, statistics = found["features"], reference.statistics
    real: Any = reference.features
    match metric:
        case "fid":
            return {"fid": _distance_to(statistics["features"], features)}
        case "sfid":
            return {"sfid": _distance_to(statistics["spatial"], found["spatial"])}
        case "is":
            return _named(("inception_score_mean", "inception_score_std"), inception_score(found["logits"]))
        case "kid":
            return _named(("kid_mean", "kid_std"), kernel_distance(features, real))
        case "prc":
            return _named(("precision", "recall"), precision_recall(features, real))
        case "prc-adm":
            return _named(("precision_adm", "recall_adm"), precision_recall_adm(features, real))
        case "dc":
            return _named(("density", "coverage"), density_coverage(features, real))
        case "fid-infinity":
            return {"fid_infinity": fid_infinity(features, statistics["features"])}
        case "per-class":
            labels: Any = (classes, reference.labels)
            distances = per_class_distance(features, labels[0], real, labels[1])
            return {"per_class_fid": {str(label): distance for label, distance in distances.items()}}
    raise ValueError(f"`{metric}` is no metric")


def _distance_to(reference: Statistics, features: Tensor) -> float:
    return frechet_distance(feature_statistics(features), reference)


def _named(names: tuple[str, str], values: tuple[float, float]) -> dict[str, float]:
    return dict(zip(names, values, strict=True))


def _intervals(
    figures: dict[str, Any], found: dict[str, Tensor], reference: Reference, replicates: int
) -> dict[str, tuple[float, float]]:
    """95 % intervals by bootstrap of the figures that resampling does not distort."""
    intervals = {}
    for figure, role in (("fid", "features"), ("sfid", "spatial")):
        if figure in figures:
            distance = partial(_distance_to, reference.statistics[role])
            intervals[f"{figure}_interval"] = bootstrap_interval(distance, found[role], replicates)
    if "inception_score_mean" in figures:
        score = bootstrap_interval(lambda logits: inception_score(logits)[0], found["logits"], replicates)
        intervals["inception_score_interval"] = score
    return intervals


def _protocol(
    config: EvaluateConfig, extractor: Extractor, found: dict[str, Tensor], reference: Reference, size: str
) -> dict[str, Any]:
    """All that the figures depend on beside the images themselves."""
    count = len(found["features"])
    protocol = {
        "name": f"FID on {extractor.name} features",
        "features": extractor.name,
        "feature_width": found["features"].shape[1],
        "extractor_sha256": extractor.sha256,
        "extractor_accuracy": extractor.accuracy,
        "num_images": count,
        "image_size": size,
        "reference": reference.source,
        "reference_sha256": reference.sha256,
        "num_reference_images": reference.count,
        "reference_resize": config.resize,
        "evaluation_batch_size": config.batch_size,
        "inception_score": "10 splits, shuffled",
        "precision_recall": f"{NEIGHBOURS} nearest neighbours on the features of the FID",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torch-fidelity")},
    }
    if reference.features is not None:
        protocol["kid"] = f"{SUBSETS} subsets of {subset_size(count, len(reference.features))}"
    return protocol


def _warnings(metrics: list[str], found: dict[str, Tensor], reference: Reference, size: str) -> list[str]:
    """What a reader of the figures must know."""
    warnings = []
    count, width = found["features"].shape
    for images, number in (("images", count), ("reference images", reference.count or width + 1)):
        if number <= width:
            warnings.append(
                f"{number} {images} are too few for {width} features: "
                "their covariance is singular and the FID biased upwards"
            )
    if "per-class" in metrics:
        warnings.append(
            "per-class FIDs are of few images each: compare them between models, not with the FID"
        )
    if reference.image_size not in (None, size):
        warnings.append(
            f"images are {size} but the reference is {reference.image_size}; "
            "set `evaluate.resize` to bring it to their size"
        )
    return warnings
