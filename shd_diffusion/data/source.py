"""What models are trained on: raw items in any order, and how they become what a model sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from shd_diffusion.data.decoding import UnreadableImage
from shd_diffusion.data.labelled import LabelledImages
from shd_diffusion.errors import UserError


class Source(ABC):
    """Raw items with labels, and the way from a batch of them to what the model sees.

    Nothing here is random: which items are flipped and the noise that a latent is sampled with are given.

    Attributes:
        dataset: item i is a tensor and its label.
        shape: (C, H, W) of what the model sees.
        num_classes: labels go from 0 to `num_classes` - 1.
        needs_noise: `clean` samples, and so needs standard normal noise of `shape`.
        num_workers: processes that read ahead; 0 reads in this one.
    """

    dataset: Dataset[tuple[Tensor, int]]
    shape: tuple[int, int, int]
    num_classes: int
    needs_noise: bool
    num_workers: int

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @abstractmethod
    def clean(self, items: Tensor, flipped: Tensor, noise: Tensor | None) -> Tensor:
        """What the model sees, before any noise of the forward process.

        Args:
            items: B raw items.
            flipped: (B,) bool, which of them to mirror left to right, where the config allows it.
            noise: (B, C, H, W) standard normal; None where `needs_noise` is false.

        Returns:
            (B, C, H, W), float32.
        """

    def first(self, count: int) -> tuple[Tensor, Tensor]:
        """The first items as the model sees them, (count, C, H, W), and their labels (count,).

        Nothing is flipped, and latents are at their mean.
        """
        items, labels = default_collate([self.dataset[index] for index in range(count)])
        noise = torch.zeros(count, *self.shape) if self.needs_noise else None
        return self.clean(items, torch.zeros(count, dtype=torch.bool), noise), labels

    def batches(self, sampler: Sampler[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Raw items and labels (B,) in the sampler's order.

        Raises:
            UserError: an item cannot be read.
        """
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        try:
            yield from loader
            return
        except UserError as error:
            # Without its traceback nothing holds the workers any longer, so that they end at once.
            message = _last_line(error.with_traceback(None))
            if isinstance(error, UnreadableImage):
                message += "; remove it, or train on what `shd-diffusion prepare` writes, which leaves it out"
        raise UserError(message)


class ImageSource(Source):
    """Images in [-1, 1] from 8-bit ones."""

    needs_noise = False

    def __init__(self, images: LabelledImages, horizontal_flip: bool = False, num_workers: int = 0) -> None:
        self.dataset: LabelledImages = images
        self.shape, self.num_classes = images.shape, images.num_classes
        self.horizontal_flip, self.num_workers = horizontal_flip, num_workers

    def clean(self, items: Tensor, flipped: Tensor, noise: Tensor | None = None) -> Tensor:
        images = items.float() / 127.5 - 1
        if not self.horizontal_flip:
            return images
        return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def check_source(source: Source, shape: tuple[int, int, int], num_classes: int, place: str) -> None:
    """See that a model can be trained on a source.

    Args:
        shape: (C, H, W) of the model's input.
        num_classes: the model's.
        place: the config file and the key of the model, for the message.

    Raises:
        UserError: shapes or classes differ.
    """
    if shape != source.shape:
        raise UserError(
            f"{place} makes a model of {shape} inputs (channels, height, width), "
            f"but `data` gives {source.shape}; make them equal"
        )
    if num_classes != source.num_classes:
        raise UserError(
            f"{place} makes a model of {num_classes} classes, "
            f"but `data` has {source.num_classes}; make them equal"
        )


def _last_line(error: UserError) -> str:
    """The message of an error; from a worker it comes with the worker's traceback, in whose last line it stands."""
    *traceback, last = str(error).rstrip().split("\n")
    return last.partition(": ")[2] if traceback else last
