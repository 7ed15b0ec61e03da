"""The seam between a baseline and a training step: what it asks for, what it is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from shd_diffusion.attention import AttentionBlock, AttentionCapture, AttentionRecord, attention_blocks
from shd_diffusion.attention.blocks import output_weight
from shd_diffusion.losses.blocks import LayerMap, map_blocks
from shd_diffusion.models.adapter import predict, sample_shape


@dataclass(frozen=True)
class Captured:
    """Of one model's forward pass: attention records by block, and outputs by module path."""

    records: Mapping[str, AttentionRecord] = field(default_factory=dict)
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> Captured:
        """The same on another device."""
        return Captured(
            {name: record.to(device) for name, record in self.records.items()},
            {name: output.to(device) for name, output in self.outputs.items()},
        )


class Baseline(nn.Module):
    """A term of the loss that may have parameters of its own; they train with the student and stay behind.

    Built from its section of the config, the frozen teacher and the student; called with what was captured of
    the teacher and of the student, (B samples each), it gives a scalar. Only the student and the baseline's
    parameters receive gradients.

    Attributes:
        pairs: student block or module -> the teacher's.
        needs_records: whether it looks at attention records; otherwise at the outputs of `pairs`.
    """

    pairs: dict[str, str]
    needs_records: bool = False

    def forward(self, teacher: Captured, student: Captured) -> Tensor:
        raise NotImplementedError


@torch.no_grad()
def running_blocks(model: ModelMixin) -> dict[str, AttentionBlock]:
    """The attention blocks that leave records in a plain pass, by trying: MDTv2's side block runs in masked ones only.

    Raises:
        ValueError: there are none.
    """
    one = torch.zeros(1, device=model.device)
    noised = one.new_zeros((1, *sample_shape(model)), dtype=model.dtype)
    with AttentionCapture(model) as capture:
        predict(model, noised, one, one.long())
        ran = capture.records
    return {name: block for name, block in attention_blocks(model).items() if name in ran}


def map_attention(teacher: ModelMixin, student: ModelMixin, layer_map: LayerMap) -> dict[str, str]:
    """The teacher's attention block of each student's: see `map_blocks`.

    Raises:
        ValueError: they cannot be mapped.
    """
    theirs, ours = ({n: b.kind for n, b in running_blocks(m).items()} for m in (teacher, student))
    pairs = map_blocks(theirs, ours, layer_map)
    if not pairs:
        raise ValueError("the layer map leaves out every block")
    return pairs


def enclosing_block(attention: str) -> str:
    """Module path of the transformer block around an attention module: the innermost one that is numbered.

    `transformer_blocks.3.attn1` lies in `transformer_blocks.3`; a UNet's `mid_block.attentions.0` is its own.
    """
    parts = attention.split(".")
    while len(parts) > 1 and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def width(model: nn.Module, attention: str) -> int:
    """Channels C of the tokens that an attention block writes to."""
    weight = output_weight(model, attention)
    assert weight is not None
    return weight.shape[0]


def tokens(output: Tensor) -> Tensor:
    """An output as tokens (B, N, C) in float32 or better; images (B, C, H, W) become H·W of them."""
    flat = output.flatten(2).transpose(1, 2) if output.ndim == 4 else output
    return flat.double() if flat.dtype.itemsize == 8 else flat.float()
