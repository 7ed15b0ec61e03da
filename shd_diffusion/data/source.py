"""What models are trained on: raw items in any order, and how they become what a model sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shd_diffusion.data.decoding import SmallImage
from shd_diffusion.data.image_sets import Images
from shd_diffusion.data.images import from_bytes
from shd_diffusion.data.unreadable import CorruptImages, Unreadable, read_or_next
from shd_diffusion.errors import UserError
from shd_diffusion.models.denoiser import pad


class Source(ABC):
    """Raw items with their conditions, and the way from a batch of them to what the model sees.

    Nothing here is random: which items are flipped and the noise that a latent is sampled with are given.

    Attributes:
        dataset: item i is a dict of tensors, among them the condition by argument of the denoiser.
        shape: of what the model sees, (C, H, W), or (C, F, H, W) of videos.
        image_size: (H, W) of the images in pixels.
        num_classes: labels go from 0 to `num_classes` - 1; None without classes.
        class_names: of all classes, where they have names.
        condition_names: which entries of an item are the condition.
        null: the condition that stands for none, (1, ...) by argument, as far as the data know it.
        needs_noise: `clean` samples, and so needs standard normal noise of `shape`.
        num_workers: processes that read ahead; 0 reads in this one.
    """

    dataset: Dataset[dict[str, Tensor]]
    shape: tuple[int, ...]
    image_size: tuple[int, int]
    num_classes: int | None
    class_names: list[str] | None = None
    condition_names: list[str]
    null: dict[str, Tensor]
    needs_noise: bool
    num_workers: int

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    @abstractmethod
    def clean(self, items: Mapping[str, Tensor], flipped: Tensor, noise: Tensor | None) -> Tensor:
        """What the model sees, before any noise of the forward process.

        Args:
            items: B raw items.
            flipped: (B,) bool, which of them to mirror left to right, where the config allows it.
            noise: (B, *shape) standard normal; None where `needs_noise` is false.

        Returns:
            (B, *shape), float32.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the data do."""

    @property
    def groups(self) -> list[range]:
        """Items that can be in one batch: those of one size."""
        return [range(len(self))]

    def shape_of(self, items: Mapping[str, Tensor]) -> tuple[int, ...]:
        """What a batch of raw items looks like to the model, (C, H, W) or (C, F, H, W): `shape` but for its size."""
        return self.shape

    def item(self, index: int, epoch: int) -> dict[str, Tensor]:
        """A raw item; of several captions an image has, each epoch takes the next one."""
        return self.attempt(index, epoch)[0]

    def attempt(self, index: int, epoch: int) -> tuple[dict[str, Tensor], Unreadable]:
        """As `item`, and which images could not be read for it; see `read_or_next`."""
        return self.dataset[index], {}

    def condition(self, items: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model is told of raw items, by argument of the denoiser; empty without a condition."""
        return {name: items[name] for name in self.condition_names}

    def example(self) -> dict[str, Tensor]:
        """The condition of one sample, (1, ...) by argument, to see what shapes it has."""
        return self.condition(pad([self.item(0, 0)]))

    def first(self, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The first items as the model sees them, (count, *shape), and their condition.

        Nothing is flipped, and latents are at their mean.
        """
        items = pad([self.item(index, 0) for index in range(count)])
        noise = torch.zeros(count, *self.shape) if self.needs_noise else None
        return self.clean(items, torch.zeros(count, dtype=torch.bool), noise), self.condition(items)

    def batches(self, sampler: Iterable[list[int]]) -> Iterator[dict[str, Tensor]]:
        """Raw items in the sampler's order, stacked by name; number e·len + i is item i in epoch e.

        Raises:
            UserError: an item cannot be read.
        """
        loader: DataLoader[Any] = DataLoader(
            _Epochs(self),
            batch_sampler=sampler,
            collate_fn=_collate,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            # Without one the loader draws from torch's own generator, and dropout after it is another.
            generator=torch.Generator(),
        )
        corrupt = CorruptImages(len(self))
        try:
            for items, unreadable in loader:
                corrupt.add(unreadable)
                yield items
            return
        except UserError as error:
            # Without its traceback nothing holds the workers any longer, so that they end at once.
            message = _last_line(error.with_traceback(None))
            if isinstance(error, SmallImage):
                message += "; remove it, or train on what `shd-diffusion prepare` writes, which leaves it out"
        raise UserError(message)


class ImageSource(Source):
    """Images in [-1, 1] from 8-bit ones."""

    needs_noise = False

    def __init__(self, images: Images, horizontal_flip: bool = False, num_workers: int = 0) -> None:
        self.dataset: Images = images
        self.shape, self.image_size = images.shape, images.shape[1:]
        self.num_classes, self.class_names, self.null = images.num_classes, images.class_names, images.null
        self.condition_names = list(images.condition(0))
        self.horizontal_flip, self.num_workers = horizontal_flip, num_workers

    def clean(self, items: Mapping[str, Tensor], flipped: Tensor, noise: Tensor | None = None) -> Tensor:
        images = from_bytes(items["image"])
        return mirrored_where(flipped, images, images.flip(-1)) if self.horizontal_flip else images

    def attempt(self, index: int, epoch: int) -> tuple[dict[str, Tensor], Unreadable]:
        return read_or_next(self.dataset, index)

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()


class _Epochs(Dataset[tuple[dict[str, Tensor], Unreadable]]):
    """Item e·N + i of a source of N items is its item i in epoch e, with what could not be read for it."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, number: int) -> tuple[dict[str, Tensor], Unreadable]:
        epoch, index = divmod(number, len(self.source))
        return self.source.attempt(index, epoch)


def _collate(
    attempts: Sequence[tuple[dict[str, Tensor], Unreadable]],
) -> tuple[dict[str, Tensor], list[Unreadable]]:
    """Items stacked by name, and what could not be read for them."""
    return pad([item for item, _ in attempts]), [unreadable for _, unreadable in attempts]


def mirrored_where(flipped: Tensor, straight: Tensor, mirrored: Tensor) -> Tensor:
    """(B, ...): samples of `mirrored` where `flipped`, (B,), and of `straight` elsewhere."""
    return torch.where(flipped.view(-1, *[1] * (straight.ndim - 1)), mirrored, straight)


def _last_line(error: UserError) -> str:
    """The message of an error; from a worker it comes with the worker's traceback, in whose last line it stands."""
    *traceback, last = str(error).rstrip().split("\n")
    return last.partition(": ")[2] if traceback else last
