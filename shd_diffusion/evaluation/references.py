"""What images are compared with: statistics and features of real images, extracted once and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shd_diffusion.config import DataConfig
from shd_diffusion.data import ReferenceImages, reference_images
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.classifiers import cache_folder
from shd_diffusion.evaluation.extractors import Extractor
from shd_diffusion.evaluation.features import extract_features
from shd_diffusion.evaluation.fid import Statistics, feature_statistics
from shd_diffusion.evaluation.images import ImageSet, ResizedImages, open_images, open_npz, tensor_images
from shd_diffusion.files import replacing_file
from shd_diffusion.processes import processes


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
    """

    source: str
    sha256: str
    count: int | None
    statistics: dict[str, Statistics]
    features: Tensor | None = None
    labels: Tensor | None = None
    image_size: str | None = None
    images: ImageSet | None = None


def open_reference(
    source: str | Path | Tensor | ReferenceImages,
    extractor: Extractor,
    batch_size: int,
    resize: str = "none",
    size: int = 0,
) -> Reference:
    """A reference from the name of a data set, a folder, an .npz, a statistics file of our own, or images.

    Args:
        source: `digits`; a folder of images; an .npz of the ADM suite, with `mu`, `sigma`, `mu_s`,
            `sigma_s`, images `arr_0`, or both; a .safetensors file of `save_reference`; the images of a data
            set; or uint8 images (R, 3, H, W).
        extractor: what the features are extracted by.
        resize: filter by which images are brought to `size`; `none` leaves them as they are.

    Raises:
        UserError: it cannot be read, or holds statistics of another extractor.
    """
    if isinstance(source, Tensor):
        return _from_images(tensor_images(source, "reference"), "images", extractor, batch_size)
    if source == "digits":
        source = reference_images(DataConfig(name="digits"))
    if isinstance(source, ReferenceImages):
        return _from_images(source, source.source, extractor, batch_size)
    check_reference(str(source))
    path = Path(source)
    if path.suffix == ".safetensors":
        return load_reference(path, extractor)
    published = _published_statistics(path, extractor) if path.suffix == ".npz" else {}
    if published and "arr_0" not in open_npz(path):
        return Reference(str(path), _file_hash(path), None, published)
    files = open_images(path)
    reference = _from_images(
        files if resize == "none" else ResizedImages(files, size, resize), str(path), extractor, batch_size
    )
    # The suite's statistics are of the whole data set, its images a sample of it for precision and recall.
    return (
        replace(reference, sha256=_file_hash(path), count=None, statistics=published)
        if published
        else reference
    )


def check_reference(source: str) -> None:
    """See that a reference is there, without reading it.

    Raises:
        UserError: it is not.
    """
    if source != "digits" and not Path(source).exists():
        raise UserError(
            f"evaluate.reference: {source} is no data set (known: digits), and no such file or folder"
        )


def save_reference(reference: Reference, extractor: Extractor, path: Path) -> None:
    """Write a reference to a .safetensors file that `open_reference` takes in place of the images."""
    tensors: dict[str, Tensor] = {}
    for role, statistics in reference.statistics.items():
        tensors |= {f"{role}/mean": statistics.mean, f"{role}/covariance": statistics.covariance}
    tensors |= {"features": reference.features} if reference.features is not None else {}
    tensors |= {"labels": reference.labels} if reference.labels is not None else {}
    about = {
        "source": reference.source,
        "sha256": reference.sha256,
        "count": reference.count,
        "image_size": reference.image_size,
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
    }
    with replacing_file(path) as temporary:
        save_file(tensors, temporary, {"reference": json.dumps(about)})


def load_reference(path: Path, extractor: Extractor) -> Reference:
    """Read what `save_reference` wrote.

    Raises:
        UserError: the file is damaged, or of another extractor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["reference"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- not a mapping
    except (OSError, SafetensorError, KeyError, ValueError):
        raise UserError(
            f"{path}: not a file of reference statistics; delete it and have it made anew"
        ) from None
    if about["extractor_sha256"] != extractor.sha256:
        raise UserError(
            f"{path}: statistics of `{about['extractor']}` (weights {about['extractor_sha256'][:12]}), but "
            f"images go through `{extractor.name}` ({extractor.sha256[:12]}); give the reference as images"
        )
    roles = {key.split("/")[0] for key in tensors if "/" in key}
    statistics = {
        role: Statistics(tensors[f"{role}/mean"], tensors[f"{role}/covariance"]) for role in sorted(roles)
    }
    return Reference(
        about["source"],
        about["sha256"],
        about["count"],
        statistics,
        tensors.get("features"),
        tensors.get("labels"),
        about["image_size"],
    )


def _from_images(images: ImageSet, source: str, extractor: Extractor, batch_size: int) -> Reference:
    """The reference of a set of images, from the cache if these images went through this extractor before."""
    sha256 = images.sha256()
    labels = None if images.labels is None else images.labels.tolist()
    key = hashlib.sha256(
        f"{source} {sha256} {labels} {extractor.name} {extractor.sha256}".encode()
    ).hexdigest()
    cached = cache_folder() / "references" / f"{key[:32]}.safetensors"
    if cached.exists():
        return replace(load_reference(cached, extractor), images=images)
    found = extract_features(images, extractor, batch_size, source)
    statistics = {role: feature_statistics(found[role]) for role in found if role in ("features", "spatial")}
    _, height, width = images[0].shape
    reference = Reference(
        source, sha256, len(images), statistics, found["features"], images.labels, f"{width}×{height}", images
    )
    if processes().is_main_process:
        save_reference(reference, extractor, cached)
    return reference


def _published_statistics(path: Path, extractor: Extractor) -> dict[str, Statistics]:
    """`mu`, `sigma` and their spatial kin of an .npz; none if it has no `mu`."""
    arrays = open_npz(path)
    found = {}
    for role, suffix in (("features", ""), ("spatial", "_s")):
        mean, covariance = arrays.get(f"mu{suffix}"), arrays.get(f"sigma{suffix}")
        if mean is None and covariance is None:
            continue
        if mean is None or covariance is None or covariance.shape != mean.shape * 2:
            raise UserError(
                f"{path}: `mu{suffix}` and `sigma{suffix}` do not belong together; statistics need both"
            )
        found[role] = Statistics(_exact(mean), _exact(covariance))
    if found and not extractor.has_spatial:
        raise UserError(
            f"{path}: statistics of Inception features, but the images go through `{extractor.name}`; "
            "set `evaluate.extractor` to inception-v3-compat or give the reference as images"
        )
    if not found and "arr_0" not in arrays:
        keys: Any = ", ".join(arrays) or "none"
        raise UserError(
            f"{path}: holds neither images `arr_0` nor statistics `mu` and `sigma` (keys: {keys})"
        )
    return found


def _exact(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float64))


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
