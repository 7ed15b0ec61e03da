"""The weights of an attention block by head: what makes its values, and what its output layers take of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shd_diffusion.attention.blocks import kernel_calls
from shd_diffusion.attention.probe import CONTEXT
from shd_diffusion.models.layouts import Slice, head_layout


def value_slices(model: nn.Module, name: str) -> tuple[Slice, ...]:
    """The rows that make a block's values, in the order of their keys."""
    ((_, order),) = kernel_calls(model.get_submodule(name))
    values = head_layout(model, name).values
    return values[::-1] if len(values) == 2 and order[0] == CONTEXT else values


def with_one(model: nn.Module, part: Slice, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a layer's weight and bias multiply: its inputs, with a 1 where it has a bias."""
    x = inputs[part.layer]
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) if has_bias(model, part) else x


def has_bias(model: nn.Module, part: Slice) -> bool:
    return getattr(model.get_submodule(part.layer), "bias", None) is not None


def has_shift(norm: nn.Module) -> bool:
    return getattr(norm, "bias", None) is not None


def head_rows(model: nn.Module, part: Slice, width: int) -> Tensor:
    """Rows of weight and bias as they multiply `with_one` from the right, (heads, c, d), float64."""
    linear: Any = model.get_submodule(part.layer)
    parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
    return torch.cat(parts, 1)[part.indices].detach().double().unflatten(0, (-1, width)).mT


def values_and_outputs(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Of each head W^V (M, c, d), and W^O of all streams side by side (M, d, C)."""
    layout = head_layout(model, name)
    value = torch.cat([head_rows(model, part, layout.width) for part in value_slices(model, name)], 1)
    outputs = [output_columns(model, part).T.unflatten(0, (layout.heads, -1)) for part in layout.outputs]
    return value.repeat_interleave(layout.sharing, 0), torch.cat(outputs, 2)


def output_columns(model: nn.Module, part: Slice) -> Tensor:
    """Columns of a weight, (C, heads·d), float64."""
    linear: Any = model.get_submodule(part.layer)
    weight: Tensor = linear.weight
    return weight[:, part.indices].detach().double()


def write_head(model: nn.Module, part: Slice, head: int, weight: Tensor) -> None:
    """The rows of one head from what `head_rows` gives of it."""
    linear: Any = model.get_submodule(part.layer)
    start = part.start + head * weight.shape[1]
    rows = slice(start, start + weight.shape[1])
    linear.weight.data[rows] = weight[: linear.in_features].T.to(linear.weight)
    if linear.bias is not None:
        linear.bias.data[rows] = weight[-1].to(linear.bias)


def write_values(model: nn.Module, name: str, values: Tensor) -> None:
    """Values of all heads that have some of their own (G, c, d), of all rows that make them one after the other."""
    parts = value_slices(model, name)
    layers: list[Any] = [model.get_submodule(part.layer) for part in parts]
    sizes = [layer.in_features + (layer.bias is not None) for layer in layers]
    for head, of_head in enumerate(values):
        for part, weight in zip(parts, of_head.split(sizes), strict=True):
            write_head(model, part, head, weight)


def write_output(model: nn.Module, part: Slice, weight: Tensor, constant: Tensor) -> None:
    """The columns of the heads, and the constant beside them."""
    linear: Any = model.get_submodule(part.layer)
    linear.weight.data[:, part.indices] = weight.T.to(linear.weight)
    if linear.bias is not None:
        linear.bias.data.copy_(constant)


def scale_norm(norm: Any, factor: Tensor, shift: Tensor) -> None:
    norm.weight.data *= factor.to(norm.weight)
    if has_shift(norm):
        norm.bias.data.mul_(factor.to(norm.bias)).add_(shift.to(norm.bias))
