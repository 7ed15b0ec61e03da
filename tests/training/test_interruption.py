"""Which signals end a run."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from shd_diffusion.training.interruption import Interruption


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_what_the_process_ignores_does_not_end_its_run(before: signal.Handlers) -> None:
    """`nohup` ignores the end of a session, and a shell's background jobs Ctrl-C."""
    accelerator: Any = SimpleNamespace(num_processes=1)
    kept = signal.signal(signal.SIGHUP, before)
    try:
        with Interruption(accelerator) as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert interruption.noted() == (0 if before == signal.SIG_IGN else signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, kept)


def test_a_cluster_is_heard_although_a_shell_in_between_ignores_it() -> None:
    """As `trap '' USR1` before `exec torchrun` has it, see docs/clusters.md."""
    accelerator: Any = SimpleNamespace(num_processes=1)
    kept = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Interruption(accelerator) as interruption:
            signal.raise_signal(signal.SIGUSR1)
            assert interruption.noted() == signal.SIGUSR1
            signal.raise_signal(signal.SIGUSR1)  # ends nothing, as before
    finally:
        signal.signal(signal.SIGUSR1, kept)
