"""Counting what a computation does: floating-point operations, and bytes of memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

Shape = tuple[int, ...]


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor has numbers to look at now: no, while a graph is compiled, or where there is no content."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor))


class Meter(TorchDispatchMode):
    """Context that counts what is computed within it; tensors need no content.

    torch's own `FlopCounterMode` keeps alive what gradient checkpointing would free, so its formulas are used alone.

    Args:
        outside: tensors that were there before, whose views and in-place results are no new memory.

    Attributes:
        operations: of matrix products, convolutions and attention, 2 a multiplication.
        live: bytes that tensors made within it hold now, those included that autograd and checkpointing keep.
        peak: the most of that at one time.
        largest: the bytes of the largest tensor.
    """

    def __init__(self, outside: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.operations, self.live, self.peak, self.largest = 0, 0, 0, 0
        # held, so that no new one gets the address of an old one
        self._outside = [tensor.untyped_storage() for tensor in outside]
        self._known = {storage._cdata for storage in self._outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := FORMULAS.get(func.overloadpacket)) is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()  # tensors without content have no other address
        if address in self._known or not size:
            return
        self._known.add(address)
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
        weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # torch has one for every attention kernel but that of CPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operations by kernel: (arguments, out_val=result) to a number."""
