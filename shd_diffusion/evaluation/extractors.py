"""Feature extractors by name, all through torch-fidelity's registry, with weights from a file or a cache."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_clip import MODEL_URLS as CLIP_URLS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.classifiers import RECIPES, trained_classifier
from shd_diffusion.evaluation.dinov2 import URLS as DINOV2_URLS
from shd_diffusion.evaluation.dinov2 import DinoV2Extractor
from shd_diffusion.processes import processes

SPATIAL_CHANNELS = 7  # × 17 × 17 = 2,023 numbers, about as many as the 2,048 pooled ones


@dataclass(frozen=True)
class Kind:
    """A kind of extractor: its layers by role, where its weights are published, how their file is read."""

    layers: dict[str, str]
    url: str | None
    build: Callable[[str, list[str], Path], FeatureExtractorBase]


class Extractor(nn.Module):
    """8-bit images (N, 3, H, W) to features by role.

    `features` are what distances are taken on; `logits`, of classifiers, are for the Inception Score;
    `spatial`, of Inception, are for sFID: the first 7 channels of TensorFlow's `mixed_6/conv`, 17×17,
    channels last (N, 2023).

    Attributes:
        name: of the extractor.
        sha256: of the file that its weights come from.
        accuracy: of a classifier trained on the spot, on held-out images.
    """

    def __init__(self, name: str, weights: Path) -> None:
        super().__init__()
        self.name = name
        self.sha256 = _sha256(weights)
        self.layers = KINDS[name].layers
        self.network: FeatureExtractorBase = _open(name, weights)
        self.accuracy = _recorded_accuracy(weights)  # of a file that can be read, as is known by now
        self._spatial: Tensor | None = None
        if self.has_spatial:
            self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @property
    def has_spatial(self) -> bool:
        return self.name == "inception-v3-compat"

    @property
    def has_logits(self) -> bool:
        return "logits" in self.layers

    def roles(self, images: Tensor) -> dict[str, Tensor]:
        """All features of the images, (N, D) for each role."""
        found = dict(zip(self.layers, self.network(images), strict=True))
        if self._spatial is not None:
            found["spatial"], self._spatial = self._spatial.permute(0, 2, 3, 1).flatten(1), None
        return found

    def forward(self, images: Tensor) -> Tensor:
        """The features (N, D) alone."""
        return self.roles(images)["features"]

    def _keep_spatial(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].clone()


def image_size_of(name: str) -> int | None:
    """Width and height of the only images that an extractor takes; None where it resizes them itself."""
    return RECIPES[name].size if name in RECIPES else None


def load_extractor(name: str, weights: Path | str | None = None) -> Extractor:
    """An extractor by name, with the weights of a file, else trained (classifiers), cached or downloaded.

    Raises:
        UserError: an unknown name, or weights that cannot be had; the message says which file to supply.
    """
    if name not in KINDS:
        raise UserError(f"evaluate.extractor: `{name}` is unknown; known here: {', '.join(KINDS)}")
    path = None if weights is None else Path(weights)
    if path is not None and not path.is_file():
        published = f"; {Path(url).name} is published at {url}" if (url := KINDS[name].url) else ""
        raise UserError(f"evaluate.extractor_weights: {path} is missing{published}")
    with processes().local_main_process_first():
        return Extractor(name, path or _default_weights(name))


def _default_weights(name: str) -> Path:
    if name in RECIPES:
        return trained_classifier(name)
    url = str(KINDS[name].url)
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise UserError(
                f"evaluate.extractor: the weights of `{name}` cannot be downloaded ({error}); "
                f"fetch {url} elsewhere and set `evaluate.extractor_weights` to the file {path.name}"
            ) from None
    return path


def _open(name: str, weights: Path) -> FeatureExtractorBase:
    kind = KINDS[name]
    try:
        return kind.build(name, list(kind.layers.values()), weights)
    except (RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"evaluate.extractor_weights: {weights} does not hold weights of `{name}` ({reason})"
        ) from None


def _from_file(name: str, layers: list[str], weights: Path | io.BytesIO) -> FeatureExtractorBase:
    return create_feature_extractor(
        name, layers, cuda=False, feature_extractor_weights_path=weights, verbose=False
    )


def _from_tensors(name: str, layers: list[str], weights: Path) -> FeatureExtractorBase:
    """For a reader that would run pickled code: it gets a file in memory with nothing but the tensors."""
    buffer = io.BytesIO()
    torch.save(_state_dict(weights), buffer)
    buffer.seek(0)
    return _from_file(name, layers, buffer)


def _dinov2(name: str, _layers: list[str], weights: Path) -> FeatureExtractorBase:
    return DinoV2Extractor(name, _state_dict(weights))


def _state_dict(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _recorded_accuracy(path: Path) -> float | None:
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        accuracy = (file.metadata() or {}).get("accuracy")
    return None if accuracy is None else float(accuracy)


KINDS = {
    **{name: Kind({"features": "features", "logits": "logits"}, None, _from_file) for name in RECIPES},
    "inception-v3-compat": Kind(
        {"features": "2048", "logits": "logits_unbiased"}, URL_INCEPTION_V3, _from_tensors
    ),
    **{name: Kind({"features": "dinov2"}, url, _dinov2) for name, url in DINOV2_URLS.items()},
    **{name: Kind({"features": "clip"}, url, _from_file) for name, url in CLIP_URLS.items()},
}
