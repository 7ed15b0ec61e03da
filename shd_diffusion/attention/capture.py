"""Capture what a model's attention blocks attend to, while the model runs as it always does."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from shd_diffusion.attention.blocks import attention_blocks, attention_modules, output_weight
from shd_diffusion.attention.records import AttentionRecord

Call = tuple[tuple[Any, ...], dict[str, Any]]


class AttentionCapture:
    """Context in which every forward pass of `model` leaves a record of each attention block.

    Args:
        model: a diffusers model, or one wrapped by DistributedDataParallel or `torch.compile`.
        blocks: names of the blocks that are wanted (see `attention_blocks`); None for all that can be captured.

    Raises:
        ValueError: an unknown block, one that cannot be captured, or a model without any.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str] | None = None) -> None:
        self._model = extract_model_from_parallel(model, keep_torch_compile=False)
        known = attention_blocks(self._model)
        names = [n for n, b in known.items() if b.capturable] if blocks is None else [n for n in known if n in blocks]
        unknown = sorted(set(blocks or ()) - set(known))
        if unknown:
            raise ValueError(f"{type(self._model).__name__} has no attention block {', '.join(unknown)}; it has {', '.join(known)}")
        if not names:
            raise ValueError(f"{type(self._model).__name__} has no attention block that can be captured")
        modules = attention_modules(self._model)
        self._blocks = {name: known[name] for name in names}
        self._modules = {name: modules[name] for name in names}
        self._recorders: dict[str, _Recorder] = {}
        self._clear: Any = None

    def __enter__(self) -> AttentionCapture:
        for name, module in self._modules.items():
            self._recorders[name] = _install(module)
        self._clear = self._model.register_forward_pre_hook(lambda *_: self._forget())
        return self

    def __exit__(self, *_: object) -> None:
        self._clear.remove()
        for name, module in self._modules.items():
            _restore(module, self._recorders[name])

    def _forget(self) -> None:
        for recorder in self._recorders.values():
            recorder.calls = ()

    @property
    def records(self) -> dict[str, AttentionRecord]:
        """Records of the last forward pass by block name, in the order in which the blocks ran."""
        if not any(recorder.calls for recorder in self._recorders.values()):
            return {}
        records = {}
        for name, recorder in self._recorders.items():
            if not recorder.calls:
                processor = type(getattr(self._modules[name], "processor", None)).__name__
                raise RuntimeError(f"attention block {name} recorded nothing (its processor is {processor})")
            args, kwargs = recorder.calls[0]
            query, key, value, mask, scale = _arguments(*args, **kwargs)
            records[name] = AttentionRecord(
                name, self._blocks[name].kind, query, key, value, output_weight(self._modules[name]), scale, mask
            )
        return records


class _Recorder:
    """Beside one attention module: its former forward, and the kernel calls of its last run."""

    def __init__(self, inner: Callable[..., Any], recording: bool = True) -> None:
        self.inner = inner
        self.outer: _Recorder | None = None
        self.recording = recording
        self.calls: tuple[Call, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a captured module runs, and records nothing: live records can be neither copied nor pickled."""
        return _Recorder, (self.inner, False)


class _Intercept(TorchFunctionMode):
    """Notes the arguments of scaled_dot_product_attention on their way to it."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.recorder.calls = (*self.recorder.calls, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replaces an attention module's forward. A bound method with its state beside it on the module, not a closure:
    so it follows the module into a deep copy, is pickled by its name, and compiled blocks share one graph."""
    recorder = self._attention_recorder
    if not recorder.recording or (not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1):
        return recorder.inner(*args, **kwargs)
    recorder.calls = ()
    with _Intercept(recorder):
        return recorder.inner(*args, **kwargs)


def _install(module: nn.Module) -> _Recorder:
    recorder = _Recorder(module.forward)
    module._attention_recorder = recorder  # type: ignore[assignment]
    module.forward = types.MethodType(forward, module)
    return recorder


def _restore(module: nn.Module, recorder: _Recorder) -> None:
    recorder.recording = False
    del module.forward
    del module._attention_recorder


def _arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    """Arguments of scaled_dot_product_attention as a record keeps them."""
    return query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale
