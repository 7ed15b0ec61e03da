"""A model whose heads attend by squeezed maps: what SHD claims to preserve, without a student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from shd_diffusion.attention import AttentionCapture, AttentionRecord, attention_blocks


@contextmanager
def squeezed_attention(model: nn.Module, maps: Callable[[AttentionRecord], Tensor]) -> Iterator[None]:
    """Context in which each attention block of `model` uses other maps than its own.

    A block's own values go into its own output projection; only the maps change. What a block sees is what the
    blocks before it have put out with their changed maps.

    Args:
        model: its blocks are self- or cross-attention.
        maps: the maps (B, M, Q, K) that the M heads of a block use, from the record of the pass under way.

    Raises:
        ValueError: a block joins two streams.
    """
    with ExitStack() as stack:
        for name, block in attention_blocks(model).items():
            if not block.capturable:
                continue
            if block.kind == "joint":
                raise ValueError(f"attention block `{name}` joins two streams; its maps cannot be replaced")
            capture = stack.enter_context(AttentionCapture(model, [name]))
            projection = _output_projection(model.get_submodule(name))
            stack.callback(
                projection.register_forward_pre_hook(partial(_replace, capture, name, maps)).remove
            )
        yield


def _replace(
    capture: AttentionCapture,
    name: str,
    maps: Callable[[AttentionRecord], Tensor],
    projection: nn.Module,
    inputs: tuple[Tensor],
) -> tuple[Tensor]:
    """Stands in for [A_1 V_1, ..., A_M V_M], (B, Q, M·d), before the output projection."""
    record = capture.records[name]
    attended = maps(record) @ record.value.float()
    return (attended.transpose(1, 2).flatten(2).to(inputs[0].dtype),)


def _output_projection(module: Any) -> nn.Module:
    projection: nn.Module = module.to_out if isinstance(module.to_out, nn.Linear) else module.to_out[0]
    return projection
