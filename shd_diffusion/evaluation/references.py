"""What images are compared with: statistics and features of real images, extracted once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shd_diffusion.config import DataConfig
from shd_diffusion.data import ReferenceImages, open_dataset, reference_images
from shd_diffusion.data.folder import tell_order
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.evaluation.extractors import Extractor, image_size_of
from shd_diffusion.evaluation.features import extract_features
from shd_diffusion.evaluation.frechet import Statistics, feature_statistics
from shd_diffusion.evaluation.images import ImageSet, ResizedImages, open_image_files, open_npz, tensor_images
from shd_diffusion.evaluation.metric import Need
from shd_diffusion.files import cache_folder, save_tensors, sha256
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce

DESCRIBED = ("source", "sha256", "count", "image_size", "class_names")
FEWEST_IMAGES = 10  # on either side: one for each split of the Inception Score


@dataclass(frozen=True)
class Reference:
    """Real images by their features.

    Attributes:
        source: where they come from, for people.
        sha256: hash of all that they follow from.
        count: how many images the statistics are of; None where that is unknown.
        statistics: by role, `features` and with Inception `spatial`.
        features: (R, D), which KID, precision and recall need; None where only statistics are published.
        labels: (R,) classes of the images behind `features`, where they are known.
        image_size: "width×height" of the images; None where that is unknown.
        images: the images behind `features`, where they are at hand.
        class_names: of the classes by their numbers, where they have names.
    """

    source: str
    sha256: str
    count: int | None
    statistics: dict[str, Statistics]
    features: Tensor | None = None
    labels: Tensor | None = None
    image_size: str | None = None
    images: ImageSet | None = None
    class_names: list[str] | None = None


NO_REFERENCE = Reference("none", "", None, {})
"""What images are compared with that are not compared with others."""


def open_reference(
    source: str | Path | Tensor | DataConfig | ReferenceImages,
    extractor: Extractor,
    batch_size: int,
    resize: str = "none",
    size: int = 0,
) -> Reference:
    """A reference from a data set, a folder, an .npz, a statistics file of our own, or images.

    Args:
        source: `digits`; a data set by its keys in a config; a folder of images; an .npz of the ADM suite, with `mu`,
            `sigma`, `mu_s`, `sigma_s`, images `arr_0`, or both; a .safetensors file of `save_reference`; the images
            of a data set; or uint8 images (R, 3, H, W).
        extractor: what the features are extracted by.
        resize: filter by which images are brought to `size`; `none` leaves them as they are.

    Raises:
        UserError: it cannot be read, has too few images or numbers that are not finite, or is of another extractor.
    """

    def resized(images: ImageSet) -> ImageSet:
        return images if resize == "none" else ResizedImages(images, size, resize)

    if isinstance(source, Tensor):
        return _from_images(resized(tensor_images(source, "reference")), "images", extractor, batch_size)
    if source == "digits":
        source = DataConfig(name="digits")
    if isinstance(source, DataConfig):
        with _named("evaluate.reference"):
            source = reference_images(source)
    if isinstance(source, ReferenceImages):
        return _from_images(resized(source), source.source, extractor, batch_size)
    check_reference(str(source))
    path = Path(source)
    if path.suffix == ".safetensors":
        return _checked(load_reference(path, extractor), extractor, path)
    published = _published_statistics(path, extractor) if path.suffix == ".npz" else {}
    alone = (
        _checked(Reference(str(path), sha256(path), None, published), extractor, path) if published else None
    )
    if alone is not None and "arr_0" not in open_npz(path):
        return alone
    images = open_image_files(path)
    if images.class_names:
        tell_order(path, images.class_names)
    reference = _from_images(resized(images), str(path), extractor, batch_size)
    # The suite's statistics are of the whole data set, its images a sample of it for precision and recall.
    return (
        reference
        if alone is None
        else replace(reference, sha256=alone.sha256, count=None, statistics=published)
    )


def data_of(source: Any) -> str | None:
    """The name of the data set that a reference is, which decides on the extractor where none is named."""
    return source.name if isinstance(source, DataConfig) else source if isinstance(source, str) else None


def check_reference(source: str | DataConfig) -> None:
    """See that a reference is there, without reading its images.

    Raises:
        UserError: it is not.
    """
    if isinstance(source, DataConfig):
        if source.name == "prompts":
            raise UserError("evaluate.reference.name: `prompts` has no images; name a data set that has some")
        with _named("evaluate.reference"):
            open_dataset(source)
        return
    if source != "digits" and not Path(source).exists():
        raise UserError(
            f"evaluate.reference: {source} is no data set (known: digits), and no such file or folder"
        )


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Have errors about `data` say which key of the config they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def save_reference(reference: Reference, extractor: Extractor, path: Path) -> None:
    """Write a reference to a .safetensors file that `open_reference` takes in place of the images."""
    tensors: dict[str, Tensor] = {}
    for role, statistics in reference.statistics.items():
        tensors |= {f"{role}/mean": statistics.mean, f"{role}/covariance": statistics.covariance}
    tensors |= {"features": reference.features} if reference.features is not None else {}
    tensors |= {"labels": reference.labels} if reference.labels is not None else {}
    about = {key: getattr(reference, key) for key in DESCRIBED}
    about |= {"extractor": extractor.name, "extractor_sha256": extractor.sha256}
    metadata = {"reference": json.dumps(about), "checksum": _checksum(about, tensors)}
    save_tensors(tensors, path, metadata)


def load_reference(path: Path, extractor: Extractor) -> Reference:
    """Read what `save_reference` wrote.

    Raises:
        UserError: the file is damaged, or of another extractor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata["reference"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a mapping
        if _checksum(about, tensors) != metadata["checksum"]:
            raise ValueError("other numbers than were written")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = f"not a file of reference statistics, or damaged ({one_line(error)})"
        raise UserError(f"{path}: {reason}; delete it and have it made anew") from None
    if about["extractor_sha256"] != extractor.sha256:
        raise UserError(
            f"{path}: statistics of `{about['extractor']}` (weights {about['extractor_sha256'][:12]}), but "
            f"images go through `{extractor.name}` ({extractor.sha256[:12]}); give the reference as images"
        )
    statistics = {
        role: Statistics(tensors[f"{role}/mean"], tensors[f"{role}/covariance"])
        for role in ("features", "spatial")
        if f"{role}/mean" in tensors
    }
    described = {key: about.get(key) for key in DESCRIBED}  # earlier files have no names of classes
    return Reference(
        **described, statistics=statistics, features=tensors.get("features"), labels=tensors.get("labels")
    )


def _checksum(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """A hash of all that a file of `save_reference` holds."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _from_images(images: ImageSet, source: str, extractor: Extractor, batch_size: int) -> Reference:
    """The reference of a set of images, from the cache if these images went through this extractor before."""
    if len(images) < FEWEST_IMAGES:
        raise UserError(f"{source}: {len(images)} reference images are too few; give {FEWEST_IMAGES} or more")
    fingerprint = images.sha256()
    labels = None if images.labels is None else images.labels.tolist()
    key = f"{source} {fingerprint} {labels} {extractor.name} {extractor.sha256}".encode()
    cached = cache_folder() / "references" / f"{hashlib.sha256(key).hexdigest()[:32]}.safetensors"
    state = processes()
    kept = _kept(cached, extractor)
    if all(gather_object([kept is not None])) and kept is not None:  # they extract together, or none does
        return replace(kept, images=images, class_names=images.class_names)
    found = extract_features(images, extractor, batch_size, source)
    statistics = {role: feature_statistics(found[role]) for role in found if role in ("features", "spatial")}
    _, height, width = images[0].shape
    image_size = f"{width}×{height}"
    reference = Reference(
        source,
        fingerprint,
        len(images),
        statistics,
        found["features"],
        images.labels,
        image_size,
        images,
        images.class_names,
    )
    if state.is_local_main_process:  # nodes may have caches of their own
        try:
            save_reference(reference, extractor, cached)
        except OSError as error:
            announce(f"{cached}: cannot be kept ({one_line(error)}), and is computed each time")
    return reference


def _kept(cached: Path, extractor: Extractor) -> Reference | None:
    """What this machine has kept of a reference, if it has."""
    if not cached.exists():
        return None
    try:
        return load_reference(cached, extractor)
    except UserError:
        announce(f"{cached}: damaged, and computed anew")
        return None


def _published_statistics(path: Path, extractor: Extractor) -> dict[str, Statistics]:
    """`mu`, `sigma` and `mu_s`, `sigma_s` of an .npz; none if it has images alone."""
    arrays = open_npz(path)
    found = {}
    for role, suffix in (("features", ""), ("spatial", "_s")):
        both = [arrays[key] for key in (f"mu{suffix}", f"sigma{suffix}") if key in arrays]
        if not both:
            continue
        numbers = len(both) == 2 and all(array.dtype.kind in "fiu" for array in both)
        if not numbers or both[0].ndim != 1 or both[1].shape != both[0].shape * 2:
            raise UserError(
                f"{path}: `mu{suffix}` (D,) and `sigma{suffix}` (D, D) do not belong together; statistics need both"
            )
        found[role] = Statistics(*(torch.from_numpy(np.array(array, dtype=np.float64)) for array in both))
    if found and Need.SPATIAL not in extractor.spec.provides:
        raise UserError(
            f"{path}: statistics of Inception features, but the images go through `{extractor.name}`; "
            "set `evaluate.extractor` to inception-v3-compat or give the reference as images"
        )
    if "features" not in found and (found or "arr_0" not in arrays):
        keys = ", ".join(arrays) or "none"
        raise UserError(
            f"{path}: holds neither images `arr_0` nor statistics `mu` and `sigma` (keys: {keys})"
        )
    return found


@torch.no_grad()
def _checked(reference: Reference, extractor: Extractor, path: Path) -> Reference:
    """The reference from a file, whose numbers are finite and as many as the extractor's."""
    side = image_size_of(extractor.name) or 32
    device = next(extractor.parameters()).device
    of_one_image = extractor.roles(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    for role, statistics in reference.statistics.items():
        width = of_one_image[role].shape[1]
        if len(statistics.mean) != width:
            raise UserError(
                f"{path}: statistics of {len(statistics.mean)} {role}, but `{extractor.name}` has "
                f"{width}; give those of the same extractor, or the images"
            )
        if not (statistics.mean.isfinite().all() and statistics.covariance.isfinite().all()):
            raise UserError(f"{path}: its statistics are not finite; have them computed anew")
    return reference
