"""What a call of a model or of its pipeline computes, and the memory that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from shd_diffusion.operations import Meter

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Counted:
    """What one run has computed.

    Attributes:
        macs: multiply-adds of matrix products, convolutions and attention.
        samples: that the denoiser was given, over all its calls.
        peak_bytes: of all tensors that the run made and held at one time.
    """

    macs: int
    samples: int
    peak_bytes: int


@torch.no_grad()
def count(run: Run, denoiser: ModelMixin, models: Sequence[nn.Module]) -> Counted:
    """Count a run, operation by operation.

    Args:
        run: of PyTorch's own operations, neither compiled nor another library's kernels: they cannot be looked into.
        denoiser: one of the models.
        models: whose weights were there before.
    """
    samples: list[int] = []
    with _samples_of(denoiser, samples), Meter(_weights(models)) as meter:
        run()
    return Counted(meter.operations // 2, sum(samples), meter.peak)


@contextmanager
def _samples_of(denoiser: nn.Module, samples: list[int]) -> Iterator[None]:
    """Context that notes how many samples each call of the denoiser is given."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        samples.append(len(next(iter((*args, *kwargs.values())))))

    hook = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def weight_bytes(models: Sequence[nn.Module]) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in _weights(models))


def _weights(models: Sequence[nn.Module]) -> Iterator[Tensor]:
    return chain.from_iterable((*model.parameters(), *model.buffers()) for model in models)


def allocated_bytes(run: Run, device: torch.device) -> int:
    """The most that a run takes of CUDA's memory at one time beyond what is taken before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
