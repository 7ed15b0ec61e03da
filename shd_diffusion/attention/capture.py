"""Capture what a model's attention blocks attend to, while the model runs as it always does."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from shd_diffusion.attention.blocks import (
    CONTEXT,
    LINEAR,
    MAIN,
    AttentionBlock,
    attention_blocks,
    output_weight,
    passes,
    processor_name,
    streams,
)
from shd_diffusion.attention.kernels import Note, watch
from shd_diffusion.attention.records import AttentionRecord, mask_rows


class AttentionCapture:
    """Context in which every forward pass of `model` leaves a record of each attention block.

    The model computes exactly what it computes outside: processors and kernels stay as they are, and what a
    kernel is called with is noted. A record is references; no map exists before it is asked for. Gradients
    reach the model through a record's query and key. What a backward pass runs again (non-reentrant gradient
    checkpointing) is not noted. Captures may be nested, also of one model.

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
        self._taps: dict[str, _Tap] = {}
        self._hook: Any = None

    def __enter__(self) -> AttentionCapture:
        self._taps = {name: _open_tap(self._model.get_submodule(name)) for name in self._blocks}
        self._hook = self._model.register_forward_pre_hook(_Begin(tuple(self._taps.values())))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        for name, tap in self._taps.items():
            _close_tap(self._model.get_submodule(name), tap)

    @property
    def records(self) -> dict[str, AttentionRecord]:
        """Records of the last forward pass by name, in order of depth; empty before the first.

        The name is the block's. A block that joins image and text leaves a second record, of the text's
        query rows, as `<name>:context`; an image-to-video block one of its image keys, as `<name>:image`.
        A block that the pass skipped leaves none.

        Raises:
            RuntimeError: a block ran and its kernel was not seen, or did not run although `blocks` names it.
        """
        ran = [name for name, tap in self._taps.items() if tap.notes is not None]
        if ran and self._named and (idle := [name for name in self._taps if name not in ran]):
            raise RuntimeError(
                f"attention block `{idle[0]}` did not run in this pass; leave it out of `blocks`"
            )
        records = (r for name in ran for r in _read(self._model, self._blocks[name], self._taps[name]))
        return {record.name: record for record in records}


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


# --- beside the model ---------------------------------------------------------------------------------------


class _Tap:
    """Beside one attention module: its own forward, and what was noted in its last run."""

    def __init__(self, inner: Any, replaced_attribute: bool) -> None:
        self.inner = inner
        self.replaced_attribute = replaced_attribute  # such as the forward that accelerate's hooks set
        self.users = 0  # open captures
        self.with_gradients = False  # of the forward pass under way
        self.rows = 0  # tokens of the main stream
        self.notes: tuple[Note, ...] | None = None  # None: has not run

    def note(self, note: Note) -> None:
        self.notes = (*(self.notes or ()), note)

    # Notes hold graphs, which can be neither copied nor pickled: a copy of a captured module notes nothing.

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tap:
        return _Tap(copy.deepcopy(self.inner, memo), self.replaced_attribute)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class _Begin:
    """Hook at the start of a forward pass: forgets the last one."""

    def __init__(self, taps: tuple[_Tap, ...]) -> None:
        self.taps = taps

    def __call__(self, *_: Any) -> None:
        for tap in self.taps:
            tap.notes = None
            tap.with_gradients = torch.is_grad_enabled()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Begin, ((),)


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the forward of an attention module.

    A method with its state beside it on the module, not a closure: so a deep copy calls the copied module, a
    pickle finds the method by its name, and compiled blocks that differ in nothing else share one graph.
    """
    tap = self._attention_tap
    if not tap.users or _in_backward():
        return tap.inner(*args, **kwargs)
    if tap.with_gradients and not torch.is_grad_enabled():
        raise RuntimeError(
            "an attention block runs without gradients in a forward pass that has them: under reentrant "
            "checkpointing records carry none; checkpoint with use_reentrant=False (diffusers' default)"
        )
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    tap.notes, tap.rows = (), 0 if hidden_states is None else hidden_states.shape[1]
    with watch(self, tap.note):
        return tap.inner(*args, **kwargs)


def _in_backward() -> bool:
    """Whether autograd runs this, to compute a checkpointed block again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _open_tap(module: Any) -> _Tap:
    tap: _Tap | None = module.__dict__.get("_attention_tap")
    if tap is None:
        tap = module._attention_tap = _Tap(module.forward, "forward" in module.__dict__)
        module.forward = types.MethodType(forward, module)
    tap.users += 1
    return tap


def _close_tap(module: Any, tap: _Tap) -> None:
    """The last capture to leave restores the module, unless someone has wrapped its forward meanwhile."""
    tap.users -= 1
    if tap.users or getattr(module.forward, "__func__", None) is not forward:
        return
    del module._attention_tap
    if tap.replaced_attribute:
        module.forward = tap.inner
    else:
        del module.forward


# --- reading ------------------------------------------------------------------------------------------------


def _read(model: nn.Module, block: AttentionBlock, tap: _Tap) -> Iterator[AttentionRecord]:
    """The records of one block's last run."""
    module, notes = model.get_submodule(block.name), tap.notes or ()
    if len(notes) != len(passes(module)):
        raise RuntimeError(
            f"attention block `{block.name}` made {len(notes)} kernel calls that the capture sees, not "
            f"{len(passes(module))}: its processor {processor_name(module)} is unknown; set the default one"
        )
    for suffix, (read, args, kwargs) in zip(passes(module), notes, strict=True):
        call = read(*args, **kwargs)
        for stream, rows in _rows(streams(module), call.query.shape[2], tap.rows):
            weight = output_weight(model, block.name, stream)
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
                mask=call.mask if rows is None or call.mask is None else mask_rows(call.mask, rows),
            )


def _rows(order: tuple[str, ...], total: int, main: int) -> list[tuple[str, slice | None]]:
    """Which of `total` query rows belong to which stream, None for all; the main stream has `main` rows."""
    if len(order) == 1 or total == main:
        return [(MAIN, None)]
    if order[0] == MAIN:
        return [(MAIN, slice(main)), (CONTEXT, slice(main, None))]
    return [(MAIN, slice(total - main, None)), (CONTEXT, slice(total - main))]
