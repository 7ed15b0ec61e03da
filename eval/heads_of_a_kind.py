"""Teachers with heads of a known kind, made from one that is trained: shuffled, alike, or unequally strong.

They answer when it matters how heads are squeezed; see docs/results/squeezing-digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from shd_diffusion.attention import attention_blocks
from shd_diffusion.randomness import generator


@torch.no_grad()
def shuffle_heads(model: nn.Module, seed: int) -> None:
    """Give the heads of each block another order, in place; the model computes the same function.

    Raises:
        ValueError: an attention block is of a layout that is not known here.
    """
    for index, block in enumerate(_blocks(model)):
        order = torch.randperm(block.heads, generator=generator(seed, "heads", index))
        for by_head in (*_by_head(block, "to_q", "to_k", "to_v"), _output(block)):
            by_head.copy_(by_head[order].clone())


@torch.no_grad()
def make_heads_alike(model: nn.Module, noise: float, seed: int) -> None:
    """Give every second head the queries and keys of the one before it, in place, so that their maps are alike.

    Args:
        noise: on these weights, in units of their standard deviation; 0 makes the maps the same.

    Raises:
        ValueError: as `shuffle_heads`.
    """
    for index, block in enumerate(_blocks(model)):
        source = generator(seed, "alike", index)
        for by_head in _by_head(block, "to_q", "to_k"):
            copied = by_head[:-1:2].clone()
            by_head[1::2] = copied + noise * copied.std() * torch.randn(copied.shape, generator=source)


@torch.no_grad()
def weaken_heads(model: nn.Module, factor: float) -> None:
    """Scale what every second head contributes to its block's output, in place.

    Raises:
        ValueError: as `shuffle_heads`.
    """
    for block in _blocks(model):
        _output(block)[1::2] *= factor


def _blocks(model: nn.Module) -> Iterator[Attention]:
    for name in attention_blocks(model):
        block = model.get_submodule(name)
        if type(block) is not Attention:  # a subclass may keep more by head, as MDTv2 its biases
            raise ValueError(
                f"attention block `{name}` is a {type(block).__name__}, whose heads cannot be altered"
            )
        yield block


def _by_head(block: Attention, *layers: str) -> Iterator[Tensor]:
    """Views of the layers' weights (H, d, C) and biases (H, d)."""
    for layer in layers:
        for parameter in block.get_submodule(layer).parameters():
            yield parameter.data.unflatten(0, (block.heads, -1))


def _output(block: Attention) -> Tensor:
    """View of the output projection's weight, (H, C, d)."""
    weight: Tensor = block.to_out[0].weight.data
    return weight.unflatten(1, (block.heads, -1)).transpose(0, 1)
