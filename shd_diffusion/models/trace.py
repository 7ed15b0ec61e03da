"""What a forward pass of a model would look like, by running its twin without weights: shapes, and no numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.fx.experimental import _config as fx_config
from torch.overrides import TorchFunctionMode

from shd_diffusion.attention import AttentionCapture, AttentionRecord, Kind, attention_blocks
from shd_diffusion.attention.blocks import enclosing_block
from shd_diffusion.attention.outputs import output_tensors
from shd_diffusion.models.denoiser import Condition, predict
from shd_diffusion.models.own_width import width_to_set


@dataclass(frozen=True)
class Trace:
    """One plain pass of one sample, on the meta device.

    Attributes:
        shape: of the sample, (C, H, W).
        records: of every attention block that ran and can be captured, in order of depth. What runs in masked passes
            only (MDTv2's side block) is not among them, nor are text rows that end in the last block.
        output: the prediction, (1, C', H, W).
        outputs: what the attention modules of the records and the blocks around them put out, (1, N, C) or
            (1, C, H, W), by name as `output_tensors` gives it; without what takes no part in the prediction, and
            without tuples of which it cannot be told which part is the text's.
        text_outputs: which of those that came in tuples are the text's.
        padded_outputs: whose tokens may be of padding: those of text, or of text and image at once, where the condition
            has a mask.
        unreached: parameters that take no part in the prediction: those of what runs in masked passes only, or of a
            text stream that ends in the last block. No loss on a plain pass gives them a gradient.
    """

    shape: tuple[int, ...]
    records: Mapping[str, AttentionRecord]
    output: Tensor
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    text_outputs: frozenset[str] = frozenset()
    padded_outputs: frozenset[str] = frozenset()
    unreached: frozenset[str] = frozenset()

    @property
    def predicts_variance(self) -> bool:
        """Whether the model puts out twice the channels that it takes: beside its objective, a variance."""
        return self.output.shape[1] == 2 * self.shape[0]

    @property
    def kinds(self) -> dict[str, Kind]:
        """The kind of attention of each record."""
        return {name: record.kind for name, record in self.records.items()}

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
        calls = _calls(twin)
        try:
            blocks = {name: block.capturable for name, block in attention_blocks(twin).items()}
            attentions = [name for name, can in blocks.items() if can]
            modules = {*attentions, *map(enclosing_block, attentions)}
            with _kept_outputs(twin, modules) as kept:
                if not attentions:
                    output, records = predict(twin, noised, timesteps, moved), {}
                else:
                    with AttentionCapture(twin, None if all(blocks.values()) else attentions) as capture:
                        output = predict(twin, noised, timesteps, moved)
                        records = {name: record.detached() for name, record in capture.records.items()}
            for tensor in kept.values():
                tensor.retain_grad()
            output.sum().backward()
        except Exception as error:  # of any kind, a ZeroDivisionError of a model without heads for one
            given = ", ".join(moved) or "no condition"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = f"`{calls[-1]}`: {reason}" if calls else reason
            raise ValueError(
                f"{type(model).__name__} takes no samples {tuple(shape)} with {given} ({reason})"
                + width_to_set(type(model).__name__, model.config)
            ) from error
    unreached = frozenset(name for name, p in twin.named_parameters() if p.grad is None)
    outputs = {name: tensor.detach() for name, tensor in kept.items() if tensor.grad is not None}
    records = {name: record for name, record in records.items() if not _ends(name, kept, outputs)}
    parts, padded = {name for name in outputs if ":" in name}, any("mask" in name for name in condition)
    streams = _streams(twin, shape, moved, outputs) if parts or padded else {}
    outputs = {name: tensor for name, tensor in outputs.items() if name in streams or name not in parts}
    return Trace(
        shape,
        records,
        output.detach(),
        outputs,
        text_outputs=frozenset(name for name in parts if streams.get(name) == "text"),
        padded_outputs=frozenset(name for name in streams if padded and streams[name] != "image"),
        unreached=unreached,
    )


def _calls(model: ModelMixin) -> list[str]:
    """The names of the model's parts that are being called, the innermost last; after an error those it came out of."""
    open_: list[str] = []

    def enter(path: str, *_: object) -> None:
        open_.append(path)

    def leave(*_: object) -> None:
        open_.pop()

    for path, module in model.named_modules():
        if path:
            module.register_forward_pre_hook(partial(enter, path))
            module.register_forward_hook(leave)
    return open_


@contextmanager
def _kept_outputs(model: ModelMixin, modules: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While it lasts, what modules put out is kept, by name."""
    found: dict[str, Tensor] = {}

    def keep(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        found.update(output_tensors(path, output))

    hooks = [model.get_submodule(path).register_forward_hook(partial(keep, path)) for path in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _ends(record: str, kept: Mapping[str, Tensor], reached: Mapping[str, Tensor]) -> bool:
    """Whether a record is of text rows that end in their block: the prediction depends on the image's output alone."""
    path, _, stream = record.partition(":")
    parts = [name for name in kept if name.startswith(f"{path}:")]
    return bool(stream) and len(parts) > 1 and sum(name in reached for name in parts) < 2


@torch.no_grad()
def _streams(
    twin: ModelMixin, shape: tuple[int, ...], condition: Condition, outputs: Mapping[str, Tensor]
) -> dict[str, Literal["image", "text", "both"]]:
    """What the tokens of each output are of, by how their number follows the width of a sample.

    Empty where the model takes no other width.
    """
    modules = {name.partition(":")[0] for name in outputs}
    for width in (shape[-1] // 2, shape[-1] * 2):
        with suppress(Exception), torch.device("meta"), _WholeMasks(), _kept_outputs(twin, modules) as found:
            predict(twin, torch.empty(1, *shape[:-1], width), torch.zeros(1, dtype=torch.long), condition)
            streams: dict[str, Literal["image", "text", "both"]] = {}
            for name, output in outputs.items():
                size, other = output.shape[1:].numel(), found[name].shape[1:].numel()
                follows = size * width == other * shape[-1]
                streams[name] = "text" if size == other else "image" if follows else "both"
            return streams
    return {}


class _WholeMasks(TorchFunctionMode):
    """A mask has no numbers on the meta device: a model that counts the tokens of a prompt, or picks them out, is told
    all of them."""

    def __enter__(self) -> _WholeMasks:
        self._picks_all = fx_config.patch(meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
        self._picks_all.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._picks_all.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.sum and args[0].is_meta and not args[0].is_floating_point():
            args = (torch.ones(args[0].shape, dtype=torch.long, device="cpu"), *args[1:])
        return func(*args, **(kwargs or {}))
