"""Attention processors that note what the module's own processor hands to the kernel, and do nothing else."""

from __future__ import annotations

import inspect
import types
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from shd_diffusion.attention.kernels import Note, watch


class Tap:
    """Beside one attention module while it is captured: what was there before, and the notes of its last run."""

    def __init__(self, inner: Any, installed: Any) -> None:
        self.inner = inner  # the module's own processor; where it has none, its own forward or None
        self.installed = installed  # what stands in its place
        self.users = 0  # open captures
        self.with_gradients = False  # of the forward pass under way
        self.rows = 0  # tokens of the main stream
        self.notes: tuple[Note, ...] | None = None  # None: has not run

    def note(self, note: Note) -> None:
        self.notes = (*(self.notes or ()), note)

    def __reduce__(self) -> tuple[Any, ...]:
        """Notes hold graphs, which can be neither copied nor pickled: a copy of a captured module has no tap."""
        return type(None), ()


class NotingProcessor:
    """Base of the processors that a capture installs; `isinstance(model.attn_processors[...], NotingProcessor)`.

    One is the module's own processor under a subclass of its class, and both share one `__dict__`: weights
    of a processor that is a module keep their names, and `_attention_backend` set on one is set on the other.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or pickle of a captured model is not captured: it has a processor of the module's own class."""
        own = type(self).__mro__[2]  # behind the subclass and this one
        return object.__new__, (own,), self.__dict__


def install(module: Any) -> Tap:
    """Puts a noting processor in the place of the module's own; a second capture shares the first one's."""
    tap: Tap | None = module.__dict__.get("_attention_tap")
    if tap is None:
        processor: Any = getattr(module, "processor", None)
        if _has_call(processor):
            tap = Tap(processor, _as(_noting_class(processor.__class__), processor))
            _set_processor(module, tap.installed)
        else:  # none, or a plain function: nothing that could be wrapped keeping its signature
            tap = Tap(module.__dict__.get("forward"), types.MethodType(_forward, module))
            module.forward = tap.installed
        module._attention_tap = tap
    tap.users += 1
    return tap


def remove(module: Any, tap: Tap) -> None:
    """The last capture to leave restores the module, unless someone has put another in its place meanwhile."""
    tap.users -= 1
    if tap.users:
        return
    del module._attention_tap
    if getattr(module, "processor", None) is tap.installed:
        _set_processor(module, tap.inner)
    elif module.__dict__.get("forward") is tap.installed:
        del module.forward
        if tap.inner is not None:
            module.forward = tap.inner


def replaced(module: Any, tap: Tap) -> bool:
    """Whether another processor was set inside the capture, which then sees nothing."""
    return tap.users > 0 and tap.installed not in (
        getattr(module, "processor", None),
        module.__dict__.get("forward"),
    )


def in_backward() -> bool:
    """Whether autograd runs this, to compute a checkpointed block again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@cache
def _noting_class(own: Any) -> Any:
    """A subclass of a processor's class whose call is noted; diffusers reads the call's signature."""

    @wraps(own.__call__)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return _noted(attn, super(noting, self).__call__, (attn, *args), kwargs)

    names = {"__call__": call, "__module__": __name__, "__qualname__": f"NotingProcessor[{own.__qualname__}]"}
    # some code tells processors by their name
    noting: Any = type(own.__name__, (NotingProcessor, own), names)
    return noting


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for the forward of a module without a processor."""
    tap = getattr(self, "_attention_tap", None)
    own = None if tap is None else tap.inner
    return _noted(self, own or types.MethodType(type(self).forward, self), args, kwargs)


def _noted(module: Any, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tap = getattr(module, "_attention_tap", None)
    if tap is None or not tap.users or in_backward():
        return run(*args, **kwargs)
    if tap.with_gradients and not torch.is_grad_enabled():
        raise RuntimeError(
            "an attention block runs without gradients in a forward pass that has them: under reentrant "
            "checkpointing records carry none; checkpoint with use_reentrant=False (diffusers' default)"
        )
    tap.notes, tap.rows = (), _main_rows(args, kwargs)
    with watch(module, tap.note):
        return run(*args, **kwargs)


def _main_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of the stream that a module or a processor is given first."""
    first = next((arg for arg in args if isinstance(arg, Tensor)), kwargs.get("hidden_states"))
    return 0 if first is None else first.shape[-2]


def _as(cls: Any, processor: Any) -> Any:
    """The same processor, state and all, under another class."""
    other = object.__new__(cls)
    object.__setattr__(other, "__dict__", processor.__dict__)
    return other


def _has_call(processor: Any) -> bool:
    """Whether its class defines its call in Python: not None, no function, no `functools.partial`."""
    return isinstance(inspect.getattr_static(type(processor), "__call__", None), types.FunctionType)


def _set_processor(module: Any, processor: Any) -> None:
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:  # MochiAttention
        module.processor = processor
