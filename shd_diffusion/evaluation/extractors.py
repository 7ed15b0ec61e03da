"""Feature extractors by name, with weights from a file, trained on the spot, or cached."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_clip import MODEL_URLS as CLIP_URLS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from shd_diffusion.errors import UserError, did_you_mean, one_line
from shd_diffusion.evaluation import efficientnet
from shd_diffusion.evaluation.classifiers import RECIPES, ClassifierExtractor, trained_classifier
from shd_diffusion.evaluation.dinov2 import URLS as DINOV2_URLS
from shd_diffusion.evaluation.dinov2 import DinoV2Extractor
from shd_diffusion.evaluation.image_text import (
    ImageTextEncoder,
    check_image_text_encoder,
    load_image_text_encoder,
)
from shd_diffusion.evaluation.metric import Need
from shd_diffusion.files import sha256
from shd_diffusion.processes import processes

SPATIAL_CHANNELS = 7  # × 17 × 17 = 2,023 numbers, about as many as the 2,048 pooled ones
OF_DATA = {
    "digits": "digits-classifier",
    "fashion_mnist": "fashion-mnist-classifier",
    "emoji": efficientnet.NAME,
}
"""The extractors of small data sets; all others have photographs, for which Inception is usual."""


@dataclass(frozen=True)
class ExtractorSpec:
    """An extractor: the roles of its outputs, how a file of weights is read, where one is published, what it allows.

    `packaged`: where a package has put its weights. `distance`: what reports call the Fréchet distance on its features,
    where that is not FID.
    """

    roles: tuple[str, ...]
    build: Callable[[str, Path], nn.Module]
    url: str | None = None
    packaged: Callable[[], Path] | None = None
    provides: tuple[Need, ...] = ()
    distance: str | None = None


class Extractor(nn.Module):
    """8-bit images (N, 3, H, W) to features by role.

    `features` are what distances are taken on; `logits`, of classifiers, are for the Inception Score;
    `spatial`, of Inception, are for sFID: the first 7 channels of TensorFlow's `mixed_6/conv`, 17×17,
    channels last (N, 2023).

    Attributes:
        sha256: of the file that its weights come from, or of the CLIP model.
        accuracy: of a classifier trained on the spot, on held-out images.
        reported: its name in a protocol: weights that are not those published under a name have another.
    """

    def __init__(self, name: str, weights: Path) -> None:
        super().__init__()
        self.name, self.spec = name, EXTRACTORS[name]
        try:
            self.network = self.spec.build(name, weights)
            self.accuracy = _recorded_accuracy(weights)
        except UserError:
            raise
        except Exception as error:  # of any kind, from files of something else
            raise UserError(
                f"evaluate.extractor_weights: {weights} does not hold weights of `{name}` ({one_line(error)[:200]})"
            ) from None
        network = self.network
        self.sha256 = network.sha256 if isinstance(network, ImageTextEncoder) else sha256(weights)
        self.reported = name if is_published(self.spec.url, self.sha256) else f"{name}:{self.sha256[:8]}"
        self._spatial: Tensor | None = None
        if Need.SPATIAL in self.spec.provides:
            self.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep_spatial)

    def roles(self, images: Tensor) -> dict[str, Tensor]:
        """All features of the images, (N, D) for each role."""
        found = dict(zip(self.spec.roles, self.network(images), strict=True))
        if self._spatial is not None:
            found["spatial"], self._spatial = self._spatial.permute(0, 2, 3, 1).flatten(1), None
        return found

    def forward(self, images: Tensor) -> Tensor:
        """The features (N, D) alone."""
        return self.roles(images)["features"]

    def _keep_spatial(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].clone()


def is_published(url: str | None, sha256: str) -> bool:
    """Whether weights are those of an address that has their hash, as CLIP's do, or its first digits at the end, as
    torch hub's do; also where there is nothing to tell."""
    published = re.search(r"/([0-9a-f]{64})/|-([0-9a-f]{8,})\.[^/]*$", url or "")
    return published is None or sha256.startswith(published[1] or published[2])


def extractor_name(name: str | None, data: str | None) -> str:
    """The extractor of `evaluate.extractor`; without one, that of a data set by its name, else Inception."""
    return name or OF_DATA.get(data or "", "inception-v3-compat")


def distance_title(name: str) -> str:
    """What reports call the Fréchet distance on the features of an extractor, known here or not."""
    spec = EXTRACTORS.get(name)
    return spec.distance if spec and spec.distance else f"FID ({name})"


def image_size_of(name: str) -> int | None:
    """Width and height of the only images that an extractor takes; None where it resizes them itself."""
    return RECIPES[name].size if name in RECIPES else None


def check_image_size(name: str, size: tuple[int, int]) -> None:
    """See that an extractor takes images (H, W).

    Raises:
        UserError: it does not.
    """
    only = image_size_of(name)
    if only is not None and size != (only, only):
        raise UserError(
            f"key `evaluate.extractor`: `{name}` takes {only}×{only} images only, not {size[1]}×{size[0]}; set another"
        )


def find_extractor(
    name: str, weights: Path | str | None = None, clip_model: str | None = None
) -> tuple[ExtractorSpec, Path | None]:
    """What is known of an extractor, and the file that holds its weights; None if that must be had first.

    Raises:
        UserError: an unknown name, a missing file, or no CLIP model for `clip`.
    """
    if name not in EXTRACTORS:
        raise UserError(f"evaluate.extractor: `{name}` is unknown; {did_you_mean(name, EXTRACTORS)}")
    spec = EXTRACTORS[name]
    if name == CLIP:
        if clip_model is None:
            raise UserError(
                "evaluate.extractor: `clip` is the CLIP model of `evaluate.clip_model`; set that too"
            )
        check_image_text_encoder(clip_model)
        return spec, Path(clip_model)
    if weights is not None:
        if not Path(weights).is_file():
            published = f"; {Path(spec.url).name} is published at {spec.url}" if spec.url else ""
            raise UserError(f"evaluate.extractor_weights: {weights} is missing{published}")
        return spec, Path(weights)
    if spec.packaged is not None:
        return spec, spec.packaged()
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(spec.url or "").name
    return spec, cached if cached.is_file() else None


def load_extractor(name: str, weights: Path | str | None = None, clip_model: str | None = None) -> Extractor:
    """An extractor by name, with the weights of a file, else trained (classifiers), cached or downloaded.

    Args:
        clip_model: the folder or hub name of the CLIP model that `clip` stands for.

    Raises:
        UserError: an unknown name, or weights that cannot be had; the message says which file to supply.
    """
    spec, path = find_extractor(name, weights, clip_model)
    with processes().local_main_process_first():
        if path is None:
            path = trained_classifier(name) if spec.url is None else _download(name, spec.url)
        return Extractor(name, path)


def _download(name: str, url: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.exists():  # another process may have been first
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except OSError as error:
            raise UserError(
                f"evaluate.extractor: the weights of `{name}` cannot be downloaded ({one_line(error)}); "
                f"fetch {url} elsewhere and set `evaluate.extractor_weights` to the file {path.name}"
            ) from None
    return path


def _inception(name: str, weights: Path) -> nn.Module:
    """torch-fidelity would run pickled code: it gets a file in memory with nothing but the tensors."""
    buffer = io.BytesIO()
    torch.save(_state_dict(weights), buffer)
    buffer.seek(0)
    return _from_torch_fidelity(name, ["2048", "logits_unbiased"], buffer)


def _from_torch_fidelity(name: str, layers: list[str], weights: Path | io.BytesIO) -> nn.Module:
    return create_feature_extractor(
        name, layers, cuda=False, feature_extractor_weights_path=weights, verbose=False
    )


def _state_dict(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)


def _recorded_accuracy(path: Path) -> float | None:
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        accuracy = (file.metadata() or {}).get("accuracy")
    return None if accuracy is None else float(accuracy)


CLIP = "clip"
_WITH_LOGITS = ("features", "logits")
EXTRACTORS = {
    name: ExtractorSpec(
        _WITH_LOGITS,
        lambda name, weights: ClassifierExtractor(name, load_file(weights)),
        provides=(Need.LOGITS, Need.OWN_CLASSES),
    )
    for name in RECIPES
}
EXTRACTORS["inception-v3-compat"] = ExtractorSpec(
    _WITH_LOGITS, _inception, URL_INCEPTION_V3, provides=(Need.LOGITS, Need.SPATIAL)
)
EXTRACTORS[efficientnet.NAME] = ExtractorSpec(
    _WITH_LOGITS,
    lambda _, weights: efficientnet.EfficientNetExtractor(weights),
    packaged=efficientnet.packaged_weights,
    provides=(Need.LOGITS,),
    distance="FD (EfficientNet-Lite0)",
)
for _name, _url in DINOV2_URLS.items():
    EXTRACTORS[_name] = ExtractorSpec(
        ("features",),
        lambda name, weights: DinoV2Extractor(name, _state_dict(weights)),
        _url,
        distance=f"FD (DINOv2 {_name.removeprefix('dinov2-')})",
    )
for _name, _url in CLIP_URLS.items():
    EXTRACTORS[_name] = ExtractorSpec(
        ("features",),
        lambda name, weights: _from_torch_fidelity(name, ["clip"], weights),
        _url,
        provides=(Need.CLIP,),
    )
EXTRACTORS[CLIP] = ExtractorSpec(
    ("features",), lambda _, folder: load_image_text_encoder(str(folder)), provides=(Need.CLIP,)
)
