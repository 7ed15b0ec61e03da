"""What a layer reads and puts out as rows of a least-squares problem: tokens, or pixels and what a kernel sees."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from shd_diffusion.randomness import generator

ROWS_PER_FEATURE = 16
"""Pixels of a convolution over all calls: so many times what a kernel sees. More say little new, and cost as much."""

Places: TypeAlias = Tensor | None
"""Pixels of what a convolution puts out, the same ones of every image, (n,); None: all."""


def features(layer: nn.Module) -> int:
    """How many numbers one row of what the layer reads has."""
    weight: Any = layer.weight
    return int(weight[0].numel())


def choose_places(layer: nn.Module, output: Tensor, call: int, calls: int) -> Places:
    """Pixels of one call: all, or as many drawn at random as `ROWS_PER_FEATURE` leaves to each image.

    Args:
        output: what the layer puts out in that call, (B, C, H, W); of a linear layer (..., C), all of whose rows count.
        call: its number.
        calls: how many there are.
    """
    if not isinstance(layer, nn.Conv2d):
        return None
    pixels = output[0, 0].numel()
    most = -(-ROWS_PER_FEATURE * features(layer) // (calls * len(output)))
    if most >= pixels:
        return None
    return torch.randperm(pixels, generator=generator(0, "pixels", call))[:most].to(output.device)


def input_rows(layer: nn.Module, x: Tensor, places: Places = None) -> Tensor:
    """What the layer multiplies by its weights, (T, p); rows go with those of `output_rows`."""
    if not isinstance(layer, nn.Conv2d):
        return x.flatten(0, -2)
    seen = (  # image by image: a 3 × 3 kernel sees everything nine times
        nn.functional.unfold(image[None], layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0]  # type: ignore[arg-type]
        for image in x
    )
    return torch.cat([(each if places is None else each[:, places]).T for each in seen])


def output_rows(layer: nn.Module, output: Tensor, places: Places = None) -> Tensor:
    """What the layer puts out, (T, C)."""
    if not isinstance(layer, nn.Conv2d):
        return output.flatten(0, -2)
    pixels = output.flatten(2)
    return (pixels if places is None else pixels[..., places]).mT.flatten(0, 1)
