"""Small classifiers of small images as feature extractors: what Inception is to photographs.

A classifier is trained on the spot from a fixed seed, in seconds on a CPU, and kept in the user's cache
folder. The recipe is deterministic: one thread, its own random numbers, a fixed order of examples. So the
weights, and with them the hash that every figure carries, are the same each time on a machine.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor

from shd_diffusion.data.digits import NUM_CLASSES, digits_uint8
from shd_diffusion.files import replacing_file

WIDTH = 64  # of the features
HELD_OUT = 360  # a fifth of the digits
EPOCHS, BATCH_SIZE, LEARNING_RATE = 12, 64, 1e-3


class Classifier(nn.Module):
    """Two convolutions, a layer of `WIDTH` features, and the logits; (N, 1, 8, 8) in [-1, 1]."""

    def __init__(self, num_classes: int = NUM_CLASSES) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, WIDTH),
            nn.SiLU(),
        )
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, WIDTH) and logits (N, classes)."""
        features = self.body(images)
        return features, self.head(features)


class DigitsClassifierExtractor(FeatureExtractorBase):
    """The digits classifier as torch-fidelity wants it: 8-bit images (N, 3, 8, 8) to features and logits.

    Args:
        feature_extractor_weights_path: safetensors file of `Classifier`; `digits_classifier()` makes one.
    """

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: Any
    ) -> None:
        super().__init__(name, features_list)
        self.classifier = Classifier()
        with safe_open(feature_extractor_weights_path, framework="pt") as file:
            self.classifier.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if images.dtype != torch.uint8 or images.shape[1:] != (3, 8, 8):
            raise ValueError(
                "the digits classifier takes uint8 images (N, 3, 8, 8), "
                f"not {images.dtype} {tuple(images.shape)}"
            )
        grey = images.float().mean(dim=1, keepdim=True)
        features, logits = self.classifier(grey / 127.5 - 1)
        by_name = {"features": features, "logits": logits}
        return tuple(by_name[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)


register_feature_extractor("digits-classifier", DigitsClassifierExtractor)


def digits_classifier(cache: Path | None = None) -> Path:
    """The weights of the digits classifier, trained at the first call; the file's metadata has its accuracy.

    Args:
        cache: folder to keep the file in; the user's cache folder by default.
    """
    recipe = {
        "architecture": str(Classifier()),
        "training": [HELD_OUT, EPOCHS, BATCH_SIZE, LEARNING_RATE],
        "torch": torch.__version__,
    }
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    path = (cache or cache_folder()) / f"digits-classifier-{key}.safetensors"
    if not path.exists():
        classifier, accuracy = _train()
        with replacing_file(path) as temporary:
            save_file(
                classifier.state_dict(), temporary, {"accuracy": str(accuracy), "held_out": str(HELD_OUT)}
            )
    return path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/shd-diffusion`, or ~/.cache/shd-diffusion."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shd-diffusion"


def _train() -> tuple[Classifier, float]:
    """The classifier and its accuracy on the held-out digits."""
    images, labels = digits_uint8()
    images = images.float() / 127.5 - 1
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        held_out, training = torch.randperm(len(images)).split([HELD_OUT, len(images) - HELD_OUT])
        classifier = Classifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE)
        for _ in range(EPOCHS):
            for batch in training[torch.randperm(len(training))].split(BATCH_SIZE):
                optimizer.zero_grad()
                F.cross_entropy(classifier(images[batch])[1], labels[batch]).backward()
                optimizer.step()
        with torch.no_grad():
            guesses = classifier(images[held_out])[1].argmax(dim=1)
    return classifier, (guesses == labels[held_out]).double().mean().item()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are taken in the same order whatever the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
