"""Feature extractors by name, all of torch-fidelity's registry, with their weights from a file or a cache."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.utils import create_feature_extractor

from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.classifiers import digits_classifier

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
PUBLISHED = {
    "inception-v3-compat": f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}",
}


@dataclass(frozen=True)
class Weights:
    """The weights of an extractor: the file, its hash, and what is known of it."""

    path: Path
    sha256: str
    accuracy: float | None = None


def find_weights(name: str, weights: Path | None = None) -> Weights:
    """The weights file of an extractor: the given one, else trained (digits) or from torch's own cache.

    Raises:
        UserError: an unknown extractor, or weights that cannot be had; the message says which file to supply.
    """
    if name == "digits-classifier":
        path = weights or digits_classifier()
        with safe_open(path, framework="pt") as file:
            accuracy = (file.metadata() or {}).get("accuracy")
        return Weights(path, _sha256(path), None if accuracy is None else float(accuracy))
    if name not in PUBLISHED:
        known = ", ".join(["digits-classifier", *PUBLISHED])
        raise UserError(f"evaluate.extractor: `{name}` is not an extractor; known here: {known}")
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(PUBLISHED[name]).name
    if not path.exists():
        if weights is not None:
            raise UserError(
                f"evaluate.extractor_weights: {path} is missing; download it from {PUBLISHED[name]}"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(PUBLISHED[name], str(path))
        except OSError as error:
            raise UserError(
                f"evaluate.extractor: the weights of `{name}` cannot be downloaded ({error}); fetch "
                f"{PUBLISHED[name]} elsewhere and set `evaluate.extractor_weights` to the file {path.name}"
            ) from None
    return Weights(path, _sha256(path))


class Features(nn.Module):
    """8-bit images (N, 3, H, W) to the features (N, D) that the Fréchet distance is taken on."""

    def __init__(self, extractor: FeatureExtractorBase) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.extractor(images)[0]
        return features


def load_extractor(name: str, weights: Path | None = None) -> nn.Module:
    """The extractor as a module that maps uint8 images (N, 3, H, W) to features (N, D).

    Raises:
        UserError: as `find_weights`.
    """
    path = find_weights(name, weights).path
    layer = {"digits-classifier": "features", "inception-v3-compat": "2048"}[name]
    extractor = create_feature_extractor(
        name, [layer], cuda=False, feature_extractor_weights_path=str(path), verbose=False
    )
    return Features(extractor)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"evaluate.extractor_weights: {path} cannot be read ({error.strerror})") from None
