"""Counting what a computation does: floating-point operations, and bytes kept for a backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = tuple[int, ...]


def operation_counter() -> FlopCounterMode:
    """Context that counts the operations of matrix products, convolutions and attention, 2 a multiplication.

    torch counts every attention kernel but the one for CPUs.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    formulas = {kernel: _attention, backward: _attention_backward}
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


class Kept:
    """Bytes of the tensors that autograd keeps for the backward pass, parameters not counted."""

    bytes: int = 0


@contextmanager
def kept_for_backward(parameters: Iterable[nn.Parameter]) -> Iterator[Kept]:
    """Context that counts what forward passes inside it keep; memory that tensors share counts once."""
    kept = Kept()
    seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept
