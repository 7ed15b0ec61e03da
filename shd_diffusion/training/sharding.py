"""Models that outgrow one card: parameters, gradients and optimiser state sharded over the processes (FSDP2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(model: nn.Module) -> None:
    """Shard a model over all processes, in place: each block of its block lists by itself, then the rest.

    The first block of a list stays whole after its forward pass: DiT computes its last layer's condition with it.
    """
    for blocks in model.children():
        if isinstance(blocks, nn.ModuleList):
            for index, block in enumerate(blocks):
                fully_shard(block, reshard_after_forward=index > 0)
    fully_shard(model)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, put together; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, model: Tensor) -> Tensor:
    """A whole tensor, sharded as another one of its shape is."""
    if isinstance(model, DTensor) and tensor.shape == model.shape:
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
    return tensor


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """All tensors whole and on the CPU, in a process that is to keep them; every process must call this."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            gathered[name] = full.cpu().contiguous()
    return gathered


@torch.no_grad()
def scatter(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """The reverse of `gather`: values of whole tensors, written into tensors that may be sharded."""
    for name, tensor in into.items():
        tensor.copy_(like(tensors[name], tensor))
