"""Carry out what is missing of a study: some runs at a time, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shd_diffusion.config import RunConfig, TrainTeacherConfig, read_config
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_json
from shd_diffusion.progress import announce
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.study.config import Budget, Planned, StudyConfig

WORKER = (sys.executable, "-m", "shd_diffusion.study.worker")
USER_ERROR = UserError.exit_code  # the exit code of a command that tells a person what to mend


@dataclass(frozen=True)
class Job:
    """What is missing of one run, as commands of the command line; none where it is complete."""

    name: str
    commands: list[list[str]]
    log: Path


@dataclass(frozen=True)
class Active:
    """A job under way."""

    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]


def carry_out(study: StudyConfig, planned: Sequence[Planned], output: Path) -> list[str]:
    """Run what is missing, within the budget; an interrupted run goes on from its last checkpoint.

    Args:
        study: names the teacher, the budget, and how many processes.
        planned: all runs, in the order in which they are begun.
        output: the study's folder, which gets `logs/`.

    Returns:
        The names of the runs that failed.

    Raises:
        UserError: a run says that a person must mend something, or the teacher failed.
    """
    logs, threads = output / "logs", max(1, (os.cpu_count() or 1) // study.processes)
    if study.teacher is not None:
        teacher = _teacher_job(study.teacher, RunFolder(Path(planned[0].config.teacher.path)), logs)
        if _run_all([teacher], Budget(), 1, threads):
            raise UserError(f"{teacher.log}: the teacher's training failed; the log says why")
    jobs = [
        Job(p.name, _missing(p.run, p.config, ["distill", study.base], p.overrides), _log(logs, p.name))
        for p in planned
    ]
    return _run_all(jobs, study.budget, study.processes, threads)


def is_complete(run: RunFolder) -> bool:
    """Whether a run is trained, sampled and evaluated."""
    return run.summary_file.exists() and run.evaluation_file.exists()


def _teacher_job(config_file: str, run: RunFolder, logs: Path) -> Job:
    config = read_config(Path(config_file), TrainTeacherConfig)
    run.check(config)
    return Job("teacher", _missing(run, config, ["train-teacher", config_file], ()), _log(logs, "teacher"))


def _missing(
    run: RunFolder, config: RunConfig, train: list[str], overrides: Iterable[str]
) -> list[list[str]]:
    """The commands that complete a run."""
    sampling, path = run.samples / "sampling.json", str(run.path)
    sets = [part for override in overrides for part in ("--set", override)]
    commands = []
    if not run.summary_file.exists():
        commands.append([*train, "--output", path, *sets])
    if not sampling.exists() or read_json(sampling)["num_images"] < config.sample.num_images:
        commands.append(["sample", path])
    if commands or not run.evaluation_file.exists():
        commands.append(["evaluate", path])
    return commands


def _log(logs: Path, name: str) -> Path:
    return logs / f"{name.replace(' ', '-')}.log"


# --- processes -----------------------------------------------------------------------------------------------


def _run_all(jobs: Iterable[Job], budget: Budget, processes: int, threads: int) -> list[str]:
    """Run jobs until all are done or the budget is spent; the names of those that failed."""
    waiting = deque(job for job in jobs if job.commands)
    total, begun, done, started = len(waiting), 0, 0, time.monotonic()
    active: list[Active] = []
    failed: list[str] = []

    def affordable() -> bool:
        hours = (time.monotonic() - started) / 3600
        return hours < (budget.hours or float("inf")) and begun < (budget.runs or float("inf"))

    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no orphans
    try:
        while active or (waiting and affordable()):
            while waiting and len(active) < processes and affordable():
                active.append(_start(waiting.popleft(), threads))
                begun += 1
                announce(f"{active[-1].job.name}: begun, {begun} of {total}")
            time.sleep(0.1)
            for each in [each for each in active if each.process.poll() is not None]:
                active.remove(each)
                done += 1
                if not _succeeded(each):
                    failed.append(each.job.name)
                left = (time.monotonic() - started) / done * (total - done)
                outcome = "failed" if each.job.name in failed else "done"
                announce(f"{each.job.name}: {outcome}, {done} of {total}, about {left / 60:.0f} min to go")
    finally:
        _interrupt(active)
        signal.signal(signal.SIGTERM, terminate)
    if waiting:
        announce(f"the budget is spent, runs left: {len(waiting)}; the same command goes on with them")
    return failed


def _start(job: Job, threads: int) -> Active:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    log = job.log.open("ab")
    process = subprocess.Popen(
        [*WORKER, json.dumps(job.commands)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={"OMP_NUM_THREADS": str(threads), **os.environ},
        start_new_session=True,  # Ctrl-C reaches it once, through `_interrupt`
    )
    return Active(job, process, log)


def _succeeded(each: Active) -> bool:
    """Close a job that has ended.

    Raises:
        UserError: it asks a person to mend something, which every other run would ask too.
    """
    each.log.close()
    if each.process.returncode == USER_ERROR:
        lines = each.job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        says = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        raise UserError(says[-1] if says else f"{each.job.log}: {each.job.name} could not begin")
    return each.process.returncode == 0


def _interrupt(active: Iterable[Active]) -> None:
    """End jobs as Ctrl-C would: each keeps its last checkpoint."""
    for each in active:
        each.process.send_signal(signal.SIGINT)
    for each in active:
        try:
            each.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            each.process.kill()
        each.log.close()
