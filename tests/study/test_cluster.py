"""Runs of a study as jobs, by submitit's local executor."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import command
from studies import stand_in, study_file

from shd_diffusion.study import runner
from shd_diffusion.study.cluster import Submitted, Work, make_executor

pytest.importorskip("submitit")
LOCAL = {"cluster": "local", "timeout_min": 5}


def test_a_study_runs_as_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WORKER", stand_in(0, "was here"))
    study = study_file(tmp_path, tmp_path / "teacher", processes=2, seeds=[0], submitit=LOCAL)
    code, said, errors = command("study", study)
    assert code == 0 and "0 of 2 runs are complete" in said, errors
    assert errors.count("begun") == errors.count("done") == 2
    logs = tmp_path / "study" / "logs"
    assert [(logs / name / "seed-0.log").read_text() for name in ("kd", "vkd")] == ["was here\n"] * 2


def test_a_job_says_what_a_person_must_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WORKER", stand_in(2, "error: mend this"))
    code, _, errors = command("study", study_file(tmp_path, tmp_path / "teacher", submitit=LOCAL))
    assert code == 2 and errors.endswith("error: mend this\n") and errors.count("begun") == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"cluster": "slurm"}, "srun"), ({"cluster": "moon"}, "moon"), ({**LOCAL, "colour": 1}, "colour")],
)
def test_a_cluster_that_is_not_there(
    settings: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, errors = command("study", study_file(tmp_path, tmp_path / "teacher", submitit=settings))
    assert code == 2 and errors.startswith("error: key `submitit`: ") and errors.count("\n") == 1
    assert says in errors and not (tmp_path / "study").exists()


# A training that leaves a checkpoint when it is told to end, and then goes on. It sends its job's signal itself.
TRAINING = """
import os, pathlib, signal, sys, time
checkpoint = pathlib.Path(sys.argv[1])
if checkpoint.exists():
    sys.exit(7)
signal.signal(signal.SIGUSR1, lambda *_: (checkpoint.touch(), sys.exit(138)))
print(os.getpid(), flush=True)
if sys.argv[2] == "ended early":
    os.kill(os.getppid(), signal.SIGUSR2)
time.sleep(60)
"""


def training(folder: Path, fate: str) -> Submitted:
    work = Work([sys.executable, "-c", TRAINING, str(folder / "checkpoint"), fate], folder / "log")
    return Submitted(make_executor(LOCAL, folder / "submitit").submit(work))


def test_a_job_that_is_ended_early_is_queued_again(tmp_path: Path) -> None:
    assert training(tmp_path, "ended early").wait(60) == 7
    assert (tmp_path / "checkpoint").exists()


def test_a_job_that_is_taken_off_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("submitit.Job._results_timeout_s", 0)  # for a file that will not come
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which children of a shell's background job ignore
    job = training(tmp_path, "taken off")
    _wait_for(lambda: (tmp_path / "log").exists() and "\n" in (tmp_path / "log").read_text())
    assert job.poll() is None
    job.send_signal(signal.SIGINT)
    assert job.wait(30) == 1
    process = Path("/proc", (tmp_path / "log").read_text().strip())
    _wait_for(lambda: not process.exists() or "(zombie)" in (process / "status").read_text())
    assert not (tmp_path / "checkpoint").exists()


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
