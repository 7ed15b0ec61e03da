"""The figures of a set of images against a reference, with the protocol that they were computed under."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity.utils import create_feature_extractor

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.data.digits import digits_uint8
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.extractors import find_weights
from shd_diffusion.evaluation.images import read_images


class _Images(Dataset[Tensor]):
    """8-bit images (N, 3, H, W), as torch-fidelity takes a set of images."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def evaluate_run(
    images: Path | Tensor,
    reference: str | Path | Tensor,
    config: EvaluateConfig,
    labels: Sequence[int] | None = None,
    protocol: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """FID, Inception Score, KID, precision and recall of images against a reference.

    Args:
        images: 8-bit images (N, 3, H, W), or a folder of PNG files.
        reference: the same, or the name of a data set (`digits`).
        config: extractor and its weights.
        labels: the class that was asked for, image by image; with a classifier as extractor, the share of
            images that it recognises as asked for is `label_accuracy`.
        protocol: how the images were made (steps, scheduler, guidance, seed, ...); kept beside the figures.

    Returns:
        What `evaluation/metrics.json` holds: the figures, `protocol`, `warnings`.

    Raises:
        UserError: images or weights that cannot be read.
    """
    generated = images if isinstance(images, Tensor) else read_images(images)
    real = _reference_images(reference)
    name = config.extractor
    weights = find_weights(name, None if config.extractor_weights is None else Path(config.extractor_weights))
    smaller = min(len(generated), len(real))
    if smaller < 20:
        raise UserError(
            f"evaluate: {smaller} images are too few for these figures; give 20 or more on each side"
        )
    subset_size = min(1000, smaller // 2)
    figures = torch_fidelity.calculate_metrics(
        input1=_Images(generated),
        input2=_Images(real),
        feature_extractor=name,
        feature_extractor_weights_path=str(weights.path),
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=subset_size,
        batch_size=config.batch_size,
        cuda=torch.cuda.is_available(),
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    result: dict[str, Any] = {
        "fid": figures["frechet_inception_distance"],
        "inception_score_mean": figures["inception_score_mean"],
        "inception_score_std": figures["inception_score_std"],
        "kid_mean": figures["kernel_inception_distance_mean"],
        "kid_std": figures["kernel_inception_distance_std"],
        "precision": figures["precision"],
        "recall": figures["recall"],
    }
    if labels is not None and name == "digits-classifier":
        result["label_accuracy"] = _label_accuracy(generated, labels, name, weights.path)
    width = 2048 if name == "inception-v3-compat" else 64
    result["protocol"] = {
        **(protocol or {}),
        "name": f"FID on {name} features",
        "features": name,
        "extractor_sha256": weights.sha256,
        "extractor_accuracy": weights.accuracy,
        "feature_width": width,
        "num_images": len(generated),
        "reference": reference
        if isinstance(reference, str)
        else str(reference)
        if isinstance(reference, Path)
        else "images",
        "num_reference_images": len(real),
        "kid_subsets": 100,
        "kid_subset_size": subset_size,
        "inception_score_splits": 10,
        "precision_recall": "3 nearest neighbours on the features of the FID",
        "torch_fidelity": importlib.metadata.version("torch-fidelity"),
        "torch": torch.__version__,
    }
    result["warnings"] = _too_few(len(generated), width)
    return result


def _reference_images(reference: str | Path | Tensor) -> Tensor:
    if isinstance(reference, Tensor):
        return reference
    if reference == "digits":
        return digits_uint8()[0].expand(-1, 3, -1, -1)
    return read_images(Path(reference))


@torch.no_grad()
def _label_accuracy(images: Tensor, labels: Sequence[int], name: str, weights: Path) -> float:
    classifier = create_feature_extractor(
        name, ["logits"], cuda=False, feature_extractor_weights_path=str(weights), verbose=False
    )
    guesses = torch.cat([classifier(batch)[0].argmax(dim=1) for batch in images.split(500)])
    return (guesses == torch.as_tensor(labels)).double().mean().item()


def _too_few(images: int, width: int) -> list[str]:
    if images > width:
        return []
    return [f"{images} images are too few for {width} features: a singular covariance, a FID biased upwards"]
