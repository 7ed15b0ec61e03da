"""Capture what a model's attention blocks attend to, while the model runs as it always does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from shd_diffusion.attention.blocks import (
    LINEAR,
    AttentionBlock,
    attention_blocks,
    kernel_calls,
    output_weight,
    processor_name,
)
from shd_diffusion.attention.kernels import counted_rows, stack
from shd_diffusion.attention.probe import CONTEXT, MAIN, Streams
from shd_diffusion.attention.processors import Tap, install, remove, replaced
from shd_diffusion.attention.records import AttentionRecord, taken


class AttentionCapture:
    """Context in which every forward pass of `model` leaves a record of each attention block.

    The model computes exactly what it computes outside: each block's own processor runs inside one that notes
    what the kernel is called with (a `NotingProcessor` in `model.attn_processors`), and comes back at the end. A
    record is references; no map exists before it is asked for. Gradients reach the model through a record's
    query and key. What a backward pass runs again (non-reentrant gradient checkpointing) is not noted. Captures
    may be nested, also of one model.

        with AttentionCapture(teacher) as capture:
            teacher(noised, timestep=timesteps, class_labels=labels)
            maps = {name: record.maps() for name, record in capture.records.items()}

    Args:
        model: a diffusers model, also inside DistributedDataParallel or `torch.compile`.
        blocks: names of the wanted blocks (`attention_blocks` lists them); None for all but those of linear
            attention, which have no maps.

    Raises:
        ValueError: an unknown block, one that cannot be captured, or a model without any that can.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[str] | None = None) -> None:
        self._model = unwrap(model)
        self._named = blocks is not None
        self._blocks = _select(self._model, blocks)
        self._calls = {name: kernel_calls(self._model.get_submodule(name)) for name in self._blocks}
        self._taps: dict[str, Tap] = {}
        self._hook: Any = None

    def __enter__(self) -> AttentionCapture:
        self._taps = {name: install(self._model.get_submodule(name)) for name in self._blocks}
        self._hook = self._model.register_forward_pre_hook(_Begin(tuple(self._taps.values())))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        for name, tap in self._taps.items():
            remove(self._model.get_submodule(name), tap)

    def forget(self) -> None:
        """Let go of the last pass, whose queries, keys and values are held as long as the capture is."""
        for tap in self._taps.values():
            tap.notes = None

    @property
    def records(self) -> dict[str, AttentionRecord]:
        """Records of the last forward pass by name, in order of depth; empty before the first.

        The name is the block's. A block that joins image and text leaves a second record, of the text's
        query rows, as `<name>:context`; an image-to-video block one of its image keys, as `<name>:image`.
        A block that the pass skipped leaves none.

        Raises:
            RuntimeError: a block ran and its kernel was not seen, or did not run although `blocks` names it.
        """
        for name, tap in self._taps.items():
            if replaced(self._model.get_submodule(name), tap):
                raise RuntimeError(
                    f"the processor of `{name}` was replaced inside the capture; set it before the capture begins"
                )
        ran = [name for name, tap in self._taps.items() if tap.notes is not None]
        if ran and self._named and (idle := [name for name in self._taps if name not in ran]):
            raise RuntimeError(
                f"attention block `{idle[0]}` did not run in this pass; leave it out of `blocks`"
            )
        records = (r for name in ran for r in self._read(name))
        return {record.name: record for record in records}

    def _read(self, name: str) -> Iterator[AttentionRecord]:
        """The records of one block's last run."""
        block, tap, expected = self._blocks[name], self._taps[name], self._calls[name]
        module = self._model.get_submodule(name)
        calls = [read(*args, **kwargs) for read, args, kwargs in tap.notes or ()]
        if len(expected) == 1 and len(calls) > 1 and all(call.query.shape[0] == 1 for call in calls):
            calls = [stack(calls, tap.rows)]  # Mochi calls the kernel sample by sample
        if len(calls) != len(expected):
            raise RuntimeError(
                f"attention block `{block.name}` made {len(calls)} kernel calls that the capture sees, not "
                f"{len(expected)}, so its processor {processor_name(module)} is not known; set the class's default, or "
                "leave the block out of `blocks`"
            )
        for (suffix, streams), call in zip(expected, calls, strict=True):
            counted = counted_rows(call, among_themselves=block.kind != "cross")
            for stream, rows in _rows(streams, call.query.shape[2], tap.rows):
                weight = output_weight(self._model, name, stream)
                if weight is None:
                    continue  # the text's last block: its rows go nowhere
                yield AttentionRecord(
                    name=block.name + suffix + stream,
                    kind=block.kind,
                    query=call.query if rows is None else call.query[:, :, rows],
                    key=call.key,
                    value=call.value,
                    output_weight=weight.full_tensor() if hasattr(weight, "full_tensor") else weight,
                    scale=call.scale,
                    mask=call.mask if rows is None else taken(call.mask, rows=rows),
                    counted=counted if counted is None or rows is None else counted[:, rows],
                    own_keys=_own_keys(streams, stream, call.key.shape[2], tap.rows),
                )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside any nesting of compiled and distributed wrappers."""
    while (inner := extract_model_from_parallel(model, keep_torch_compile=False)) is not model:
        model = inner
    return model


def _select(model: nn.Module, wanted: Iterable[str] | None) -> dict[str, AttentionBlock]:
    """The blocks to capture, in the order in which they run."""
    kind, known = type(model).__name__, attention_blocks(model)
    names = [n for n, block in known.items() if block.reason != LINEAR] if wanted is None else list(wanted)
    for name in names:
        if name not in known:
            raise ValueError(f"{kind} has no attention block `{name}`; it has {', '.join(known) or 'none'}")
        if (reason := known[name].reason) is not None:
            raise ValueError(f"attention block `{name}` of {kind} cannot be captured: {reason}")
    if not names:
        raise ValueError(f"{kind} has no attention block that can be captured")
    return {name: block for name, block in known.items() if name in names}


class _Begin:
    """Hook at the start of a forward pass: forgets the last one."""

    def __init__(self, taps: tuple[Tap, ...]) -> None:
        self.taps = taps

    def __call__(self, *_: Any) -> None:
        for tap in self.taps:
            tap.notes = None
            tap.with_gradients = torch.is_grad_enabled()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Begin, ((),)


# --- reading ------------------------------------------------------------------------------------------------


def _rows(streams: Streams, total: int, main: int) -> list[tuple[str, slice | None]]:
    """Which of `total` query rows belong to which stream, None for all; the main stream has `main` rows."""
    if len(streams) == 1:
        return [(streams[0], None)]
    if total == main:
        return [(MAIN, None)]
    if streams[0] == MAIN:
        return [(MAIN, slice(main)), (CONTEXT, slice(main, None))]
    return [(MAIN, slice(total - main, None)), (CONTEXT, slice(total - main))]


def _own_keys(streams: Streams, stream: str, keys: int, main: int) -> slice | None:
    """Which of a kernel call's keys belong to a stream; None where it has one alone."""
    if len(streams) == 1:
        return None
    first = main if streams[0] == MAIN else keys - main
    return slice(0, first) if stream == streams[0] else slice(first, keys)
