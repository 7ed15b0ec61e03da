"""Forward passes of one model on many batches that pause together at chosen modules.

What comes before a module has then run once for every batch, and the module may be changed before they go on: a model
is walked through block after block in the time of one pass, whatever its class does between the blocks.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Note: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""What is kept of a module's input and output."""


@dataclass(slots=True)
class Call:
    """A module about to run: its path, and the arguments that it will run with, which may be changed. They are gone
    once it runs."""

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
        watched: by any key, the path of a module, and what is noted whenever it has run, see `noted`.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[str],
        passes: Iterable[Callable[[], object]],
        watched: Mapping[Hashable, tuple[str, Note]] | None = None,
    ) -> None:
        self._model, self._modules, self._watched = model, tuple(modules), watched or {}
        self._passes = [_Pass(run) for run in passes]
        self._hooks: list[Any] = []

    def __enter__(self) -> Lockstep:
        for key, (name, note) in self._watched.items():
            module = self._model.get_submodule(name)
            self._hooks.append(module.register_forward_hook(_Watch(key, note)))
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
            ValueError: the machine has no more threads.
            Exception: what the model raised.
        """
        calls = [call for each in self._passes if (call := each.advance()) is not None]
        if len({call.name for call in calls}) > 1 or len(calls) not in (0, len(self._passes)):
            raise RuntimeError("the model runs other modules for some batches than for others")
        return calls

    def noted(self, key: Hashable) -> list[Tensor]:
        """The next that each pass has noted at a key; the passes go on until they have.

        Raises:
            RuntimeError: they end before.
        """
        goes_on = True
        while not all(each.notes[key] for each in self._passes):
            if not goes_on:
                raise RuntimeError(f"`{self._watched[key][0]}` does not run where it is looked for")
            goes_on = bool(self.advance())
        return [each.notes[key].popleft() for each in self._passes]


class _Abandoned(BaseException):
    """Ends a pass that nobody lets go on."""


@dataclass(eq=False)
class _Pass:
    """One forward pass; exactly one of it and its caller runs at any time."""

    run: Callable[[], object]
    call: Call | None = None
    error: BaseException | None = None
    abandoned: bool = False
    ended: bool = False
    notes: defaultdict[Hashable, deque[Tensor]] = field(default_factory=lambda: defaultdict(deque))
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    paused: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    thread: threading.Thread | None = None

    def advance(self) -> Call | None:
        if self.ended:
            return None
        if self.thread is None:
            thread = _Thread(self)
            try:
                thread.start()
            except RuntimeError as error:
                raise ValueError(
                    f"each calibration batch takes a thread ({error}); take fewer images, or a larger "
                    "`train.micro_batch_size`"
                ) from error
            self.thread = thread
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
            self.of.call, self.of.ended = None, True
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
        args, kwargs = call.args, call.kwargs
        call.args, call.kwargs = (), {}  # so that nobody who still has the call holds its tensors
        return args, kwargs


class _Watch:
    """Hook after a module: notes something of its input and output in a pass."""

    def __init__(self, key: Hashable, note: Note) -> None:
        self.key, self.note = key, note

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        thread = threading.current_thread()
        if isinstance(thread, _Thread):
            thread.of.notes[self.key].append(self.note(args[0], output))
