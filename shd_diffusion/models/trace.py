"""What a forward pass of a model would look like, by running its twin without weights: shapes, and no numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode

from shd_diffusion.attention import AttentionCapture, AttentionRecord, attention_blocks
from shd_diffusion.models.denoiser import Condition, predict


@dataclass(frozen=True)
class Trace:
    """One plain pass of one sample, on the meta device.

    Attributes:
        shape: of the sample, (C, H, W).
        records: of every attention block that ran and can be captured, in order of depth. What runs in masked passes
            only (MDTv2's side block) is not among them.
        output: the prediction, (1, C', H, W).
        unreached: parameters that take no part in the prediction: those of what runs in masked passes only, or of a
            text stream that ends in the last block. No loss on a plain pass gives them a gradient.
    """

    shape: tuple[int, ...]
    records: Mapping[str, AttentionRecord]
    output: Tensor
    unreached: frozenset[str] = frozenset()

    @property
    def predicts_variance(self) -> bool:
        """Whether the model puts out twice the channels that it takes: beside its objective, a variance."""
        return self.output.shape[1] == 2 * self.shape[0]

    def width(self, name: str) -> int:
        """Channels C of the tokens that an attention block writes to."""
        return self.records[name].output_weight.shape[0]

    @property
    def heads(self) -> int:
        """The most heads that any block has; 0 if there is none."""
        return max((record.heads for record in self.records.values()), default=0)


def trace(model: ModelMixin, shape: tuple[int, ...], condition: Condition) -> Trace:
    """What a pass of a model looks like.

    Args:
        model: any; it is not run, but built anew on the meta device.
        shape: of one sample, (C, H, W).
        condition: of one sample, (1, ...) by argument.

    Raises:
        ValueError: the model does not take such samples or conditions.
    """
    with torch.device("meta"), torch.enable_grad(), _WholeMasks():
        twin = type(model).from_config(model.config).eval()
        noised, timesteps = torch.empty(1, *shape), torch.zeros(1, dtype=torch.long)
        moved = {
            name: value.to("meta", twin.dtype if value.is_floating_point() else None)
            for name, value in condition.items()
        }
        try:
            if not any(block.capturable for block in attention_blocks(twin).values()):
                output, records = predict(twin, noised, timesteps, moved), {}
            else:
                blocks = {name: block.capturable for name, block in attention_blocks(twin).items()}
                wanted = None if all(blocks.values()) else [name for name, can in blocks.items() if can]
                with AttentionCapture(twin, wanted) as capture:
                    output = predict(twin, noised, timesteps, moved)
                    records = {name: record.detached() for name, record in capture.records.items()}
            output.sum().backward()
        except Exception as error:  # of any kind, a ZeroDivisionError of a model without heads for one
            given = ", ".join(moved) or "no condition"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{type(model).__name__} takes no samples {tuple(shape)} with {given} ({reason})"
            ) from error
    unreached = frozenset(name for name, p in twin.named_parameters() if p.grad is None)
    return Trace(shape, records, output.detach(), unreached)


class _WholeMasks(TorchFunctionMode):
    """A mask has no numbers on the meta device: a model that counts the tokens of a prompt is told all of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.sum and args[0].is_meta and not args[0].is_floating_point():
            args = (torch.ones(args[0].shape, dtype=torch.long, device="cpu"), *args[1:])
        return func(*args, **(kwargs or {}))
