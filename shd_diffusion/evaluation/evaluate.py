"""The metrics of a set of images against a reference, with the protocol that they were computed under."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.data import DataConfig, ReferenceImages
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.class_folders import match_classes
from shd_diffusion.evaluation.extractors import CLIP, Extractor, extractor_name, load_extractor
from shd_diffusion.evaluation.features import extract_features
from shd_diffusion.evaluation.image_prompts import image_prompts
from shd_diffusion.evaluation.image_text import ImageTextEncoder, encode_texts
from shd_diffusion.evaluation.images import FolderImages, ImageSet, open_image_files, tensor_images
from shd_diffusion.evaluation.metric import OF_THE_IMAGES, ImageText, Metric, MetricInputs, Need
from shd_diffusion.evaluation.metrics import check_settings, choose_metrics, provided, without_reference
from shd_diffusion.evaluation.nearest import write_nearest
from shd_diffusion.evaluation.picture_precision import shared_captions
from shd_diffusion.evaluation.references import (
    FEWEST_IMAGES,
    NO_REFERENCE,
    Reference,
    data_of,
    open_reference,
)
from shd_diffusion.processes import by_main_process, processes


def compute_metrics(
    images: Path | Tensor | ImageSet,
    reference: str | Path | Tensor | DataConfig | ReferenceImages | None,
    config: EvaluateConfig,
    labels: Sequence[int] | None = None,
    protocol: dict[str, Any] | None = None,
    nearest: Path | None = None,
    prompts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The metrics of images against a reference: what `evaluation/metrics.json` holds.

    Args:
        images: 8-bit images (N, 3, H, W), a set of them, a folder of image files, or an .npz of the ADM suite.
        reference: see `open_reference`; `config.reference` goes before it. None: metrics of prompts, labels or logits
            alone.
        config: extractor, metrics, resize filter.
        labels: the class that was asked for, image by image.
        protocol: how the images were made (steps, scheduler, guidance, seed, ...); kept beside the metrics.
        nearest: where to write the real images that some of these resemble most, see `write_nearest`.
        prompts: what the images were to show, one by one; by default what lies beside them, see `image_prompts`.

    Raises:
        UserError: images, reference or weights that cannot be read, or a metric that they do not allow.
    """
    generated = _open(images)
    _check_counts(generated, config, labels=labels, prompts=prompts)
    _, height, width = generated[0].shape
    source = reference if config.reference is None else config.reference
    if source is None:
        config = without_reference(config)
    data = data_of(source)
    check_settings(config, data)
    extractor, clip = load_models(config, data)
    real = NO_REFERENCE
    if source is not None:
        real = open_reference(source, extractor, config.batch_size, config.resize, min(height, width))
    captions = None if real.images is None else real.images.captions()
    about_prompts = clip is not None or captions is not None
    if prompts is None and about_prompts and isinstance(generated, FolderImages):
        prompts = image_prompts(generated.folder, generated.paths)
    classes, unmatched = match_classes(generated, real) if labels is None else (torch.tensor(labels), None)
    _check_classes(config, classes)
    possible = _possible_needs(config, extractor, clip, real, classes, prompts, captions)
    left_out = _left_out(config, possible, unmatched)
    metrics = choose_metrics(config.metrics, possible)
    roles = extract_features(generated, extractor, config.batch_size, "images")
    if config.classes is not None and max(config.classes) >= (logits := roles["logits"].shape[1]):
        raise UserError(
            f"evaluate.classes: {max(config.classes)} is no logit of `{extractor.name}`, whose last is {logits - 1}"
        )
    if nearest is not None and processes().is_main_process:
        write_nearest(nearest, generated, roles["features"], classes, real)

    image_text = None
    if clip is not None and any(Need.IMAGE_TEXT in metric.needs for metric in metrics):
        known = roles["features"] if clip is extractor else None
        image_text = _image_text(generated, prompts or [], clip, config.batch_size, known)
    inputs = MetricInputs(
        roles,
        classes,
        real.statistics,
        real.features,
        real.labels,
        image_text,
        config.classes,
        prompts,
        captions,
    )
    entries = by_main_process(  # the others would need as much memory again
        lambda: {key: entry for metric in metrics for key, entry in _compute(metric, inputs).items()}
    )
    own: dict[str, Any] = {metric.name: metric.protocol(inputs) for metric in metrics if metric.protocol}
    if clip is not None and (image_text is not None or clip is extractor):
        own["clip_model"] = _encoder(clip).protocol()
    size = f"{width}×{height}"
    return entries | {
        "protocol": {**(protocol or {}), **_protocol(config, extractor, inputs, real, size), **own},
        "warnings": [*left_out, *_warnings(metrics, inputs, real, size)],
    }


def _check_counts(images: ImageSet, config: EvaluateConfig, **given: Sequence[object] | None) -> None:
    """Raise UserError unless the images are enough, and as many as their labels and prompts."""
    if len(images) < FEWEST_IMAGES and config.metrics != []:
        raise UserError(f"{images.name(0)}: {len(images)} images are too few; sample {FEWEST_IMAGES} or more")
    for what, of_each in given.items():
        if of_each is not None and len(of_each) != len(images):
            raise UserError(
                f"{images.name(0)}: {len(of_each)} {what} for {len(images)} images; sample them anew"
            )


def _check_classes(config: EvaluateConfig, classes: Tensor | None) -> None:
    """Raise UserError unless `evaluate.classes` names a logit for every class of the images."""
    if config.classes is not None and classes is not None and classes.max() >= len(config.classes):
        raise UserError(
            f"evaluate.classes: {len(config.classes)} logits, but images are of class {classes.max()}; name one a class"
        )


def _left_out(config: EvaluateConfig, possible: set[Need], unmatched: str | None) -> list[str]:
    """A warning of the metrics that need the classes of images, where those are not the reference's.

    Raises:
        UserError: the config names one.
    """
    if unmatched is None:
        return []
    wanted = choose_metrics(config.metrics, possible | {Need.LABELS})
    names = ", ".join(f"`{metric.name}`" for metric in wanted if Need.LABELS in metric.needs)
    if names and config.metrics is not None:
        raise UserError(f"{unmatched}; rename it, or leave out {names}")
    return [f"{names} left out: {unmatched}"] if names else []


def load_models(config: EvaluateConfig, data: str | None) -> tuple[Extractor, Extractor | None]:
    """The extractor, and that of `evaluate.clip_model` where it is set; they may be one.

    Args:
        data: the name of the data set, which decides where no extractor is named.

    Raises:
        UserError: weights cannot be had.
    """
    name = extractor_name(config.extractor, data)
    extractor = load_extractor(name, config.extractor_weights, config.clip_model)
    if config.clip_model is None or name == CLIP:
        return extractor, extractor if name == CLIP else None
    return extractor, load_extractor(CLIP, clip_model=config.clip_model)


def _encoder(clip: Extractor) -> ImageTextEncoder:
    """The network of the extractor `clip`."""
    assert isinstance(clip.network, ImageTextEncoder)
    return clip.network


def _image_text(
    images: ImageSet, prompts: Sequence[str], clip: Extractor, batch_size: int, known: Tensor | None
) -> ImageText:
    """The images and their prompts as features of one space; those of the images may be known already."""
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    if known is None:
        known = extract_features(images, clip, batch_size, "images by CLIP")["features"]
    encoder = _encoder(clip)
    texts = encode_texts(encoder, list(number), batch_size)
    groups = torch.tensor([number[prompt] for prompt in prompts])
    return ImageText(known, texts, groups, sum(map(encoder.is_cut, number)))


def _open(images: Path | Tensor | ImageSet) -> ImageSet:
    if isinstance(images, Tensor):
        return tensor_images(images, "images")
    return open_image_files(images) if isinstance(images, Path) else images


def _possible_needs(
    config: EvaluateConfig,
    extractor: Extractor,
    clip: Extractor | None,
    reference: Reference,
    labels: Tensor | None,
    prompts: Sequence[str] | None,
    captions: Sequence[Sequence[str]] | None,
) -> set[Need]:
    """The needs of metrics that are met."""
    met = {
        Need.SPATIAL: "spatial" in reference.statistics,
        Need.LABELS: labels is not None,
        Need.PROMPTS: prompts is not None,
        Need.DIFFERENT_PROMPTS: len(set(prompts or ())) > 1,
        Need.IMAGE_TEXT: clip is not None,
        Need.REFERENCE: bool(reference.statistics),
        Need.REFERENCE_IMAGES: reference.features is not None,
        Need.REFERENCE_LABELS: reference.labels is not None,
        Need.REFERENCE_CAPTIONS: captions is not None,
        Need.SHARED_CAPTIONS: len(shared_captions(prompts or (), captions or ())) > 1,
    }
    wanted = OF_THE_IMAGES.union(provided(config, extractor.spec), {Need.IMAGE_TEXT})
    return {need for need in wanted if met.get(need, True)}


def _compute(metric: Metric, inputs: MetricInputs) -> dict[str, Any]:
    """The entries of a metric, which are finite: JSON has no other numbers."""
    entries = metric.entries(inputs)
    for key, value in entries.items():
        values = value.values() if isinstance(value, dict) else (value,)
        if not all(map(math.isfinite, values)):
            raise UserError(
                f"evaluate.metrics: `{key}` is not a finite number on these features; leave it out"
            )
    return entries


def _protocol(
    config: EvaluateConfig, extractor: Extractor, inputs: MetricInputs, reference: Reference, size: str
) -> dict[str, Any]:
    """All that the metrics depend on beside the images themselves."""
    count, width = inputs.features.shape
    found: dict[str, Any] = {
        "name": f"FID on {extractor.reported} features",
        "features": extractor.reported,
        "feature_width": width,
        "extractor_sha256": extractor.sha256,
        "extractor_accuracy": extractor.accuracy,
        "num_images": count,
        "image_size": size,
        "reference": reference.source,
        "reference_sha256": reference.sha256,
        "num_reference_images": reference.count,
        "reference_resize": config.resize,
        "evaluation_batch_size": config.batch_size,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "torch-fidelity")},
    }
    return found if config.classes is None else found | {"classes": config.classes}


def _warnings(metrics: list[Metric], inputs: MetricInputs, reference: Reference, size: str) -> list[str]:
    """What a reader of the metrics must know."""
    warnings = []
    count, width = inputs.features.shape
    frechet = any("fid" in metric.name for metric in metrics)
    for images, number in (("images", count), ("reference images", reference.count or width + 1)):
        if frechet and reference.statistics and number <= width:
            warnings.append(
                f"{number} {images} are too few for {width} features: "
                "their covariance is singular and the FID biased upwards"
            )
    cautions = [metric.caution(inputs) for metric in metrics if metric.caution]
    warnings += [caution for caution in cautions if caution]
    if reference.image_size not in (None, size):
        first, second = size.split("×")
        remedy = (
            "set `evaluate.resize` to bring it to their size"
            if first == second
            else "give one of their size, since `evaluate.resize` makes squares"
        )
        warnings.append(f"images are {size} but the reference is {reference.image_size}; {remedy}")
    return warnings
