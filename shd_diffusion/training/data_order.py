"""Which image is seen when: a permutation an epoch, by index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Sampler

from shd_diffusion.randomness import generator


@dataclass(frozen=True)
class Layout:
    """How a step's images are dealt out: first over accumulated forward passes, then over processes."""

    batch_size: int
    accumulation: int = 1
    processes: int = 1
    process: int = 0

    @property
    def step_size(self) -> int:
        """Images a step, over all processes."""
        return self.batch_size * self.accumulation * self.processes

    def share(self, micro_step: int) -> slice:
        """The part of a step's images that this process takes in one forward pass."""
        start = (micro_step * self.processes + self.process) * self.batch_size
        return slice(start, start + self.batch_size)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, length: int) -> Tensor:
    return torch.randperm(length, generator=generator(seed, "order", epoch))


def step_indices(seed: int, step: int, step_size: int, length: int) -> list[int]:
    """Indices of the images that a step sees, over all processes; an epoch's end may fall inside a step."""
    indices: list[int] = []
    while len(indices) < step_size:
        epoch, position = divmod(step * step_size + len(indices), length)
        rest = position + step_size - len(indices)
        indices += _epoch_order(seed, epoch, length)[position:rest].tolist()
    return indices


class StepSampler(Sampler[list[int]]):
    """Batches of indices for one process, from any step on."""

    def __init__(self, seed: int, length: int, layout: Layout, first_step: int, last_step: int) -> None:
        self.seed, self.length, self.layout = seed, length, layout
        self.steps = range(first_step, last_step)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            indices = step_indices(self.seed, step, self.layout.step_size, self.length)
            for micro_step in range(self.layout.accumulation):
                yield indices[self.layout.share(micro_step)]

    def __len__(self) -> int:
        return len(self.steps) * self.layout.accumulation
