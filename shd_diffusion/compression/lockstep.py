"""Forward passes of one model on many batches that pause together at chosen modules.

What comes before a module has then run once for every batch, and the module may be changed before they go on: a model
is walked through block after block in the time of one pass, whatever its class does between the blocks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn


@dataclass(slots=True)
class Call:
    """A module about to run: its path, and the arguments that it will run with, which may be changed."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Lockstep:
    """Context of passes that run in turn, one at a time, from one chosen module to the next.

        with Lockstep(model, ["blocks.0.attn", "blocks.1.attn"], passes) as walk:
            while calls := walk.advance():
                ...  # every pass stands before the module calls[0].name

    Each pass is a thread, since only a thread can stand still inside a forward. They run without gradients.

    Args:
        model: the model that all passes run.
        modules: paths of the modules before which they pause.
        passes: functions that run the model on a batch each.
    """

    def __init__(
        self, model: nn.Module, modules: Iterable[str], passes: Iterable[Callable[[], object]]
    ) -> None:
        self._model, self._modules = model, tuple(modules)
        self._passes = [_Pass(run) for run in passes]
        self._hooks: list[Any] = []

    def __enter__(self) -> Lockstep:
        for name in self._modules:
            module = self._model.get_submodule(name)
            self._hooks.append(module.register_forward_pre_hook(_Pause(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for each in self._passes:
            each.abandon()

    def advance(self) -> Sequence[Call]:
        """Let every pass run to its next pause; their calls in the order of the passes, or none at their end.

        Raises:
            RuntimeError: the passes came to different modules.
            Exception: what the model raised.
        """
        calls = [call for each in self._passes if (call := each.advance()) is not None]
        if len({call.name for call in calls}) > 1 or len(calls) not in (0, len(self._passes)):
            raise RuntimeError("the model runs other modules for some batches than for others")
        return calls


class Follower:
    """The calls of a walk for readers that each want those of some modules, in step with another walk.

    The calls of a module are kept until all its readers have had them.

    Args:
        walk: through a model, with those modules.
        readers: of each module.
    """

    def __init__(self, walk: Lockstep, readers: Mapping[str, Iterable[str]]) -> None:
        self._walk, self._readers = walk, {module: frozenset(names) for module, names in readers.items()}
        self._held: dict[str, tuple[Sequence[Call], set[str]]] = {}

    def calls(self, reader: str, modules: Sequence[str]) -> list[Sequence[Call]]:
        """The calls of each of these modules that this reader has not had yet.

        Raises:
            RuntimeError: the walk ends before.
        """
        while missing := [name for name in modules if reader not in self._held.get(name, ((), set()))[1]]:
            calls = self._walk.advance()
            if not calls:
                raise RuntimeError(f"`{missing[0]}` does not run where it is looked for")
            self._held[calls[0].name] = calls, set(self._readers[calls[0].name])
        found = [self._held[name][0] for name in modules]
        for name in modules:
            waiting = self._held[name][1]
            waiting.remove(reader)
            if not waiting:
                del self._held[name]
        return found


class _Abandoned(BaseException):
    """Ends a pass that nobody lets go on."""


@dataclass(eq=False)
class _Pass:
    """One forward pass; exactly one of it and its caller runs at any time."""

    run: Callable[[], object]
    call: Call | None = None
    error: BaseException | None = None
    abandoned: bool = False
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    paused: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None

    def advance(self) -> Call | None:
        if self.thread is None:
            self.thread = _Thread(self)
            self.thread.start()
        else:
            self.go.release()
        self.paused.acquire()
        if self.error is not None:
            raise self.error
        return self.call

    def pause(self, call: Call) -> None:
        """Called by the pass itself."""
        self.call = call
        self.paused.release()
        self.go.acquire()
        if self.abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        if self.thread is not None:
            self.abandoned = True
            self.go.release()
            self.thread.join()


class _Thread(threading.Thread):
    def __init__(self, of: _Pass) -> None:
        super().__init__(daemon=True)
        self.of = of

    def run(self) -> None:
        try:
            with torch.no_grad():
                self.of.run()
        except _Abandoned:
            pass
        except BaseException as error:
            self.of.error = error
        finally:
            self.of.call = None
            self.of.paused.release()


class _Pause:
    """Hook before a module: pauses a pass, and lets everybody else through."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        thread = threading.current_thread()
        if not isinstance(thread, _Thread):
            return None
        call = Call(self.name, args, kwargs)
        thread.of.pause(call)
        return call.args, call.kwargs
