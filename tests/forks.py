"""Processes of one's own that need not import anything: forked off a server that has, once a test session.

What runs in them is what would run in a fresh interpreter; only the ten seconds that torch, diffusers and
transformers take to import are spared. (Nor does this file import them: conftest.py imports it in the process that
only hands out tests.) Fresh interpreters are started by test_page.py (the command line), test_sampling.py (torchrun),
test_processes.py (accelerate) and test_study.py (a study's worker).
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        f"shd_diffusion.{name}"
        for name in (
            "data.prepare",
            "evaluation.evaluate_run",
            "evaluation.torch_metrics",
            "sampling.sample_run",
            "study.run_study",
            "training.run",
        )
    ]
)
STARTED: weakref.WeakSet[Fork] = weakref.WeakSet()


class Fork:
    """A forked process, as far as it is used like a `subprocess.Popen`; killed with the tests' process at the latest.

    Args:
        target: the path of a script, or `module:function`; either finds `arguments` in `sys.argv`.
        environment: beside this process's own.
        output: where standard output and standard error are appended; default: to a file that `communicate` reads.
    """

    def __init__(
        self, target: str | Path, *arguments: object, output: str | None = None, **environment: str
    ) -> None:
        self._file = None if output else tempfile.NamedTemporaryFile()  # noqa: SIM115 -- open as long as this is
        # only the tests' process has a server to ask; one that was forked is as bare as the server
        context = SERVER if multiprocessing.parent_process() is None else multiprocessing.get_context("fork")
        self._process = context.Process(
            target=_run,
            args=(
                [str(part) for part in (target, *arguments)],
                {**os.environ, **environment},
                str(Path.cwd()),
                output or self._file.name,
                _threads(),
            ),
        )
        self._process.start()
        self.pid, self._parent = self._process.pid, os.getpid()
        STARTED.add(self)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait for its end: what it has said, on whichever stream."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return None, Path(self._file.name).read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def launch(number: int, target: str | Path, *arguments: object) -> None:
    """Run a script in so many processes, with all that torchrun tells them, until all have ended well."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        Fork(
            target,
            *arguments,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(number),
            LOCAL_WORLD_SIZE=str(number),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(store.port),
            TORCHELASTIC_USE_AGENT_STORE="True",  # the store is of this process, as with torchrun
            CUDA_VISIBLE_DEVICES="",
            # without it accelerate gives each process its share of the cores
            OMP_NUM_THREADS=str(_threads()),
        )
        for rank in range(number)
    ]
    deadline = time.monotonic() + 240
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.poll() for rank in ranks):
            break  # the others would wait for it
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
    said = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * number, "\n".join(said)


def _threads() -> int:
    """Of this process: sums are split among threads, so that the same number makes the same bits."""
    import torch

    return torch.get_num_threads()


def _run(argv: list[str], environment: dict[str, str], folder: str, output: str, threads: int) -> None:
    import torch

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    with open(output, "ab") as file:  # noqa: PTH123 -- as a shell redirects
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(threads)
    sys.argv = argv
    module, _, name = argv[0].partition(":")
    try:
        if name:
            getattr(importlib.import_module(module), name)()
        else:
            runpy.run_path(module, run_name="__main__")
    finally:  # multiprocessing leaves them out
        atexit._run_exitfuncs()


@atexit.register
def _end() -> None:
    for fork in STARTED:
        if fork._parent == os.getpid() and fork.poll() is None:
            fork.kill()
