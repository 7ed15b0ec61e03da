"""Small classifiers of small images as feature extractors: what Inception is to photographs.

A classifier is trained on the spot from a fixed seed, digits in seconds and Fashion-MNIST in minutes on a
CPU, and kept in the user's cache folder. The recipe is deterministic: one thread, its own random numbers, a
fixed order of examples. So the weights, and with them the hash that the protocol carries, are the same each
time on a machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shd_diffusion.data.digits import digits_uint8
from shd_diffusion.data.images import from_bytes
from shd_diffusion.data.published import fashion_mnist
from shd_diffusion.errors import UserError
from shd_diffusion.files import cache_folder, save_tensors
from shd_diffusion.progress import progress_bar

WIDTH = 64  # of the features
NUM_CLASSES = 10
BATCH_SIZE, LEARNING_RATE = 64, 1e-3

Labelled = tuple[Tensor, Tensor]
"""8-bit images (N, 1, H, W) and their labels (N,)."""


@dataclass(frozen=True)
class Recipe:
    """What a classifier is trained on: images of one size, and how often they are seen."""

    size: int
    epochs: int
    load: Callable[[], tuple[Labelled, Labelled]]  # for training, and held out


class Classifier(nn.Module):
    """Two convolutions, a layer of `WIDTH` features, and the logits; images (N, 1, size, size) in [-1, 1]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        first_pool = 1 if size < 16 else 2
        side = size // first_pool // 2
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(first_pool),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * side * side, WIDTH),
            nn.SiLU(),
        )
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, WIDTH) and logits (N, classes)."""
        features = self.body(images)
        return features, self.head(features)


class ClassifierExtractor(nn.Module):
    """A classifier for 8-bit images (N, 3, size, size), whose channels are averaged; gives what `Classifier` does."""

    def __init__(self, name: str, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.name, self.size = name, RECIPES[name].size
        self.classifier = Classifier(self.size)
        self.classifier.load_state_dict(state)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.dtype != torch.uint8 or images.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"{self.name} takes uint8 images (N, 3, {self.size}, {self.size}), "
                f"not {images.dtype} {tuple(images.shape)}"
            )
        return self.classifier(from_bytes(images.float().mean(dim=1, keepdim=True)))


def trained_classifier(name: str) -> Path:
    """The weights of a classifier, trained at the first call; the file's metadata has its held-out accuracy.

    Raises:
        UserError: the training images cannot be had.
    """
    recipe = RECIPES[name]
    with torch.device("meta"):  # draws no random numbers
        architecture = str(Classifier(recipe.size))
    key = {
        "architecture": architecture,
        "training": [recipe.epochs, BATCH_SIZE, LEARNING_RATE],
        "torch": torch.__version__,
    }
    path = cache_folder() / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        try:
            classifier, accuracy = _train(name, recipe)
        except UserError as error:
            raise UserError(
                f"evaluate.extractor: `{name}` takes its data from the usual place, whatever `data.path` is; link them "
                f"there, or give weights by `evaluate.extractor_weights` ({error})"
            ) from error
        save_tensors(classifier.state_dict(), path, {"accuracy": str(accuracy)})
    return path


def _train(name: str, recipe: Recipe) -> tuple[Classifier, float]:
    """The classifier and its accuracy on held-out images."""
    (images, labels), (held_out, held_out_labels) = recipe.load()
    steps = recipe.epochs * -(-len(images) // BATCH_SIZE)
    with (
        _one_thread(),
        torch.random.fork_rng(devices=[]),
        progress_bar(steps, f"train {name}", "step") as bar,
    ):
        torch.manual_seed(0)
        classifier = Classifier(recipe.size)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE)
        for _ in range(recipe.epochs):
            for batch in torch.randperm(len(images)).split(BATCH_SIZE):
                optimizer.zero_grad()
                _, logits = classifier(from_bytes(images[batch]))
                F.cross_entropy(logits, labels[batch]).backward()
                optimizer.step()
                bar.update()
        with torch.no_grad():
            guesses = torch.cat(
                [classifier(from_bytes(part))[1].argmax(dim=1) for part in held_out.split(500)]
            )
    return classifier, (guesses == held_out_labels).double().mean().item()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are taken in the same order whatever the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _digits() -> tuple[Labelled, Labelled]:
    """The digits, every fifth of them held out."""
    images, labels = digits_uint8()
    held_out = torch.arange(len(images)) % 5 == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def _fashion_mnist() -> tuple[Labelled, Labelled]:
    """Fashion-MNIST as models see it, padded to 32×32, from where Debian's package puts it."""
    training, test = fashion_mnist(None, "train"), fashion_mnist(None, "test")
    return (training.images, training.labels), (test.images, test.labels)


RECIPES = {
    "digits-classifier": Recipe(size=8, epochs=12, load=_digits),
    "fashion-mnist-classifier": Recipe(size=32, epochs=3, load=_fashion_mnist),
}
