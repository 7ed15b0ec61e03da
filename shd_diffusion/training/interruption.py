"""Signals by which a person or a cluster ends a run: after the step at hand, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

from shd_diffusion.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class InterruptedRun(UserError):
    """A run that a signal has ended; it goes on from the checkpoint of its last step."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum  # as shells tell it


class Interruption:
    """Context in which a signal is noted instead of ending the process; the second of a kind does end it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self._noted = accelerator, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            # what is ignored for a person's sake stays so: `nohup` has SIGHUP ignored. A cluster's SIGUSR1 is heard, as
            # a shell that is not to end by it passes on that it is ignored
            heard = [s for s in SIGNALS if s == signal.SIGUSR1 or signal.getsignal(s) != signal.SIG_IGN]
            self._before = {signum: signal.signal(signum, self._note) for signum in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._noted = signum
        signal.signal(signum, self._before[signum])

    def noted(self) -> int:
        """The signal that some process got, 0 if none did. Every process calls this at the same step."""
        if self.accelerator.num_processes == 1:
            return self._noted
        mine = torch.tensor([self._noted], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())
