"""What an attention block sees and attends to on the calls of it that a walk through the model has brought."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.attention.blocks import kernel_calls
from shd_diffusion.attention.probe import CONTEXT, MAIN
from shd_diffusion.compression.head_weights import value_slices, with_one
from shd_diffusion.compression.lockstep import Call
from shd_diffusion.models.layouts import head_layout
from shd_diffusion.squeezing.map_stream import cut

Features: TypeAlias = Callable[[], Iterator[tuple[str, Tensor, Tensor]]]
"""Of each output layer its path, rows of features F_j = A'_j H (rows, N, c), and what it should put out (rows, C)."""

_AT_ONCE = 2**24  # elements of features that exist at once


def output_streams(model: nn.Module, name: str) -> tuple[tuple[str, ...], ...]:
    """For each output layer of a block the suffixes of the records whose query rows it projects, in their order."""
    ((_, order),) = kernel_calls(model.get_submodule(name))
    layout = head_layout(model, name)
    if len(layout.queries) == 2:  # two streams with projections of their own
        return ((MAIN,), (CONTEXT,))[: len(layout.outputs)]
    return (order,)


def records_and_inputs(
    model: nn.Module, name: str, calls: Sequence[Call]
) -> Iterator[tuple[dict[str, AttentionRecord], dict[str, Tensor]]]:
    """The block's records of each call by suffix, and the inputs (B, tokens, c) of its layers by path; what the block
    puts out is not looked at."""
    module: Any = model.get_submodule(name)
    layers = {part.layer for part in head_layout(model, name).inputs}
    inputs: dict[str, Tensor] = {}

    def keep(layer: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[layer] = args[0]

    with ExitStack() as stack:
        capture = stack.enter_context(AttentionCapture(model, [name]))
        for layer in layers:
            hook = model.get_submodule(layer).register_forward_pre_hook(partial(keep, layer))
            stack.enter_context(hook)
        for call in calls:
            with _WithoutKernel():
                module(*call.args, **call.kwargs)
            yield {key.removeprefix(name): record for key, record in capture.records.items()}, dict(inputs)


class _WithoutKernel(TorchFunctionMode):
    """Context in which scaled dot-product attention, once it is noted, puts out zeros instead of taking its time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_zeros if func is scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _zeros(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_zeros(*query.shape[:-1], value.shape[-1])


def attended_features(
    model: nn.Module,
    name: str,
    calls: Sequence[Call],
    targets: Mapping[str, Sequence[Tensor]],
    rows: int | None,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """See `Features`; H has a 1 appended where the values have a bias. Rows of padding, which no other sees, are left
    out."""
    outputs, values = head_layout(model, name).outputs, value_slices(model, name)
    streams, drawn = output_streams(model, name), torch.Generator().manual_seed(0)
    for number, (records, inputs) in enumerate(records_and_inputs(model, name, calls)):
        made_from = [with_one(model, part, inputs) for part in values]
        for output, suffixes in zip(outputs, streams, strict=True):
            of_stream = [records[suffix] for suffix in suffixes]
            parts = targets[output.layer][number].split([record.query.shape[2] for record in of_stream], 1)
            for record, target in zip(of_stream, parts, strict=True):
                count = target.shape[1]
                index = torch.randperm(count, generator=drawn)[: rows or count].to(target.device)
                widest = max(record.key.shape[2], sum(each.shape[2] for each in made_from))
                for samples in samples_at_once(record, widest, len(index)):
                    maps = record.maps(samples=samples, rows=index)
                    split = maps.split([each.shape[1] for each in made_from], 3)
                    features = [
                        a @ h[samples, None].to(a.dtype) for a, h in zip(split, made_from, strict=True)
                    ]
                    joined = torch.cat(features, 3).transpose(1, 2).flatten(0, 1)  # (samples · rows, N, c)
                    wanted = target[samples][:, index].flatten(0, 1)
                    counted = record.some_counted(samples, index)
                    if counted is not None:
                        joined, wanted = joined[counted.flatten()], wanted[counted.flatten()]
                    yield output.layer, joined, wanted


def samples_at_once(record: AttentionRecord, width: int, rows: int | None = None) -> list[slice]:
    """Samples that fit into memory together, with tensors of (heads, rows, width) each."""
    batch, heads, count, _ = record.query.shape
    return cut(batch, max(1, _AT_ONCE // (heads * (rows or count) * width)))
