"""Bytes of memory that one process of a run needs, from counted sizes."""

from __future__ import annotations

from collections.abc import Iterable

from diffusers import ModelMixin
from torch import nn

from shd_diffusion.config import DistillConfig
from shd_diffusion.training.build import Parts


def memory(parts: Parts, activations: int, extra_parameters: int, processes: int = 1) -> dict[str, int]:
    """What stays, and what a pass needs at most beside it; a teacher that stays in the CPU's memory needs none of it.

    Args:
        parts: whose models may be without weights.
        activations: of a pass, see `meter_pass`.
        extra_parameters: of the loss, in float32.
        processes: over which models, gradients, moments and average are sharded; 1 for no sharding.
    """
    elsewhere = isinstance(parts.config, DistillConfig) and parts.config.teacher.device == "cpu"
    model, teacher = parts.model, None if parts.teacher is None or elsewhere else parts.teacher.model
    trained = [
        p for each in (model, teacher) if each is not None for p in each.parameters() if p.requires_grad
    ]
    sizes = {
        "teacher": 0 if teacher is None else _bytes(teacher.parameters()) // processes,
        "weights": _bytes(model.parameters()) // processes,
        "gradients": _bytes(trained) // processes,
        "optimiser": 2 * _bytes(trained) // processes,  # AdamW's two moments
        "average": _bytes(model.parameters()) // processes,
        "extra_parameters": 4 * 4 * extra_parameters,  # with gradient and moments
        "whole_blocks": 0
        if processes == 1
        else _whole(model, 2) + (0 if teacher is None else _whole(teacher, 1)),
        "activations": activations,
    }
    return sizes | {"sum": sum(sizes.values())}


def _whole(model: ModelMixin, copies: int) -> int:
    """What is put together of a sharded model (see `shard`): the block that computes and the next one, and what lies
    outside of the other blocks.

    Args:
        copies: 2 where each has a gradient too.
    """
    lists = [list(child) for child in model.children() if isinstance(child, nn.ModuleList)]
    later = [_bytes(block.parameters()) for blocks in lists for block in blocks[1:]]
    two_largest = sum(sorted(later)[-2:])
    return copies * (_bytes(model.parameters()) - sum(later) + two_largest)


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)
