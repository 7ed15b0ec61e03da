"""Runs of a study as jobs of a cluster, by submitit: SLURM, or its local executor where there is none."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shd_diffusion.errors import UserError, one_line

if TYPE_CHECKING:
    from submitit import AutoExecutor, Job
    from submitit.helpers import DelayedSubmission

PATIENCE = 60.0
"""Seconds for a step and its checkpoint, where a job is to be ended; submitit is told 90 s before it is."""

TIMEOUTS = 1000
"""So often SLURM may end a job for its time, and it is queued again: each time it has a checkpoint more."""


class Work:
    """What a job does: one process, whose output is appended to a log. It is put into the queue again where the
    cluster ends it before its time, and goes on from its checkpoint.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = list(command), log.absolute()
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Carry it out: the exit code."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            # Rather than a wait, whose lock `checkpoint`, called by a signal, would find taken.
            while (code := self._process.poll()) is None:
                time.sleep(0.1)
            return code
        finally:
            if self._process.returncode is None:  # taken off: no orphan
                self._process.terminate()

    def checkpoint(self) -> DelayedSubmission:
        """What submitit calls before the end: the process writes its checkpoint, then the same work is queued."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.send_signal(signal.SIGUSR1)
            until = time.monotonic() + PATIENCE
            while self._process.poll() is None and time.monotonic() < until:
                time.sleep(0.1)
        return DelayedSubmission(Work(self.command, self.log))


class Submitted:
    """A job, as far as it is used like a `subprocess.Popen`."""

    def __init__(self, job: Job[int]) -> None:
        self._job = job
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code of its process, 1 of a job that the cluster has ended; None as long as it is not done."""
        if self.returncode is None and self._job.done():
            try:
                self.returncode = self._job.result()
            except Exception:  # of many kinds; submitit's own log, beside the study's, says why
                self.returncode = 1
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Take it off the cluster: SLURM tells its processes by SIGTERM, whatever the signal here."""
        self._job.cancel(check=False)

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"job {self._job.job_id}", timeout)
            time.sleep(0.1)
        return code

    def kill(self) -> None:
        self._job.cancel(check=False)


def make_executor(settings: Mapping[str, Any], folder: Path) -> AutoExecutor:
    """What jobs are given to.

    Args:
        settings: parameters of submitit's executor, such as `timeout_min`, `slurm_partition` and `gpus_per_node`; and
            `cluster`, `slurm` or `local`, without which it is the one that there is.
        folder: for submitit's scripts and logs.

    Raises:
        UserError: submitit is not installed, there is no such cluster here, or a setting is unknown.
    """
    try:
        from submitit import AutoExecutor
    except ImportError:
        raise UserError(
            "key `submitit` needs the library of that name; pip install 'shd-diffusion[slurm]'"
        ) from None
    parameters = dict(settings)
    cluster, timeouts = parameters.pop("cluster", None), parameters.pop("slurm_max_num_timeout", TIMEOUTS)

    def make(place: Path | str) -> AutoExecutor:
        executor = AutoExecutor(place, cluster=cluster, slurm_max_num_timeout=timeouts)
        executor.update_parameters(**parameters)
        return executor

    try:
        with tempfile.TemporaryDirectory() as elsewhere:
            make(elsewhere)  # it makes its folder before it looks at what it is given
    except (NameError, ValueError, RuntimeError, TypeError, AssertionError) as error:
        raise UserError(f"key `submitit`: {one_line(error)[:300]}") from error
    return make(folder)
