"""Carry out what is missing of a study: some runs at a time, each in a process of its own, here or on a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from shd_diffusion.config import RunConfig, TrainTeacherConfig, read_config
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_as, read_json, write_json
from shd_diffusion.progress import announce
from shd_diffusion.reporting.runs import Samples
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.study.cluster import Submitted, Work, make_executor
from shd_diffusion.study.config import Budget, Place, Planned, StudyConfig, compressed_folder

WORKER = (sys.executable, "-m", "shd_diffusion.study.worker")


class Process(Protocol):
    """What carries out a job: a process of this machine, or a job of a cluster."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...

    def send_signal(self, signum: int, /) -> None: ...

    def wait(self, timeout: float) -> int: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class Job:
    """What is missing of one run, as commands of the command line; none where it is complete.

    It waits for the jobs that `after` names, and is not begun where one of them has failed.
    """

    name: str
    commands: list[list[str]]
    log: Path
    after: tuple[str, ...] = ()

    def worker(self, command_line: str) -> list[str]:
        """The command of a process that carries it out; its log can be written then."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        return [*WORKER, command_line, json.dumps(self.commands)]

    def start(self, command_line: str, environment: Mapping[str, str]) -> Process:
        """Carry it out in a process that appends to the log."""
        worker = self.worker(command_line)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                worker,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C reaches it once, through `_interrupt`
            )

    def check(self, code: int) -> None:
        """See why it ended.

        Raises:
            UserError: it asks a person to fix something, which every other run would ask too.
        """
        if code == UserError.exit_code:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            says = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError(says[-1] if says else f"{self.log}: {self.name} could not begin")


Start: TypeAlias = Callable[[Job, int], Process]
"""Begins a job in one of so many slots."""


def carry_out(
    study: StudyConfig, planned: Sequence[Planned], known: Collection[Place], output: Path, command_line: str
) -> list[str]:
    """Run what is missing, within the budget; an interrupted run goes on from its last checkpoint.

    Args:
        known: runs that were made elsewhere, and are made here only where another one begins with them.
        output: the study's folder, which gets `logs/`.
        command_line: the module whose `app` carries out the commands.

    Returns:
        The names of the runs that failed.

    Raises:
        UserError: a run says that a person must fix something, the teacher failed, or there is no such cluster.
    """
    start = _starter(study, output, command_line)

    def job(name: str, run: RunFolder, config: RunConfig, train: list[str]) -> Job:
        log = output / "logs" / f"{name.replace(' ', '-')}.log"
        return Job(name, _missing(run, config, train), log)

    if study.teacher is not None:
        config = read_config(Path(study.teacher), TrainTeacherConfig)
        run = RunFolder(Path(planned[0].config.teacher.path))
        run.check(config)
        teacher = job("teacher", run, config, ["train-teacher", study.teacher])
        if _run_all([teacher], Budget(), 1, start):
            raise UserError(f"{teacher.log}: the teacher's training failed; the log says why")
    path = planned[0].config.teacher.path
    made = [_compression(study, path, name, output) for name in study.compressed]
    if failed := _run_all(made, Budget(), 1, start):
        raise UserError(
            f"{output / 'logs'}: models could not be made ({', '.join(failed)}); their logs say why"
        )
    jobs: list[Job] = []
    for p in reversed(planned):  # a run that another one begins with stands before it
        if p.place not in known or any(p.name in later.after for later in jobs if later.commands):
            train = ["distill", study.distill, *_sets(p.overrides)]
            jobs.insert(0, replace(job(p.name, p.run, p.config, train), after=p.after))
    return _run_all(jobs, study.budget, study.processes, start)


def _starter(study: StudyConfig, output: Path, command_line: str) -> Start:
    """How jobs are begun: as processes of this machine, or on the cluster that the study names."""
    if study.submitit is None:
        return lambda job, slot: job.start(command_line, _share(slot, study.processes))
    executor = make_executor(study.submitit, output / "logs" / "submitit")
    return lambda job, _: Submitted(executor.submit(Work(job.worker(command_line), job.log)))


def _share(slot: int, processes: int) -> dict[str, str]:
    """The environment of one of several processes: its share of the cores, and of several GPUs one."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    return environment | (
        {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if processes > 1 < len(gpus) else {}
    )


def _compression(study: StudyConfig, teacher: str, name: str, output: Path) -> Job:
    """A model to be made of the teacher, unless it is there.

    Raises:
        UserError: it is, but made by other options.
    """
    folder, asked = compressed_folder(output, name), study.compressed[name]
    note = folder.with_name(f"{name}.json")  # what it was made by, for the next command
    if not folder.exists():
        write_json(note, asked)
    elif note.exists() and (before := read_json(note)) != asked:
        raise UserError(
            f"compressed.{name}: {folder} was made with {before}, not {asked}; name it otherwise, or delete it"
        )
    command = ["compress", teacher, "--output", str(folder)]
    for key, value in asked.items():
        command += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    log = output / "logs" / f"compress-{name}.log"
    return Job(f"compress {name}", [] if folder.exists() else [command], log)


def _sets(overrides: Iterable[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _missing(run: RunFolder, config: RunConfig, train: list[str]) -> list[list[str]]:
    """The commands that complete a run."""
    sampling, path = run.samples / "sampling.json", str(run.path)
    commands = []
    if not run.is_complete(config):
        commands.append([*train, "--output", path])
    if not sampling.exists() or read_as(sampling, Samples).num_images < config.sample.num_images:
        commands.append(["sample", path])
    if commands or not run.evaluation_file.exists():
        commands.append(["evaluate", path])
    return commands


# --- processes -----------------------------------------------------------------------------------------------


def _run_all(jobs: Iterable[Job], budget: Budget, processes: int, start: Start) -> list[str]:
    """Run jobs until all are done or the budget is spent; the names of those that failed."""
    waiting = deque(job for job in jobs if job.commands)
    total, begun, done, started = len(waiting), 0, 0, time.monotonic()
    active: dict[int, tuple[Job, Process]] = {}  # by slot, of as many as there are processes
    failed: list[str] = []

    def affordable() -> bool:
        hours = (time.monotonic() - started) / 3600
        in_time = budget.hours is None or hours < budget.hours
        return in_time and (budget.runs is None or begun < budget.runs)

    def next_ready() -> Job | None:
        """The first whose predecessor is done; those whose predecessor failed leave."""
        nonlocal done
        while (lost := next((job for job in waiting if {*job.after} & {*failed}), None)) is not None:
            waiting.remove(lost)
            failed.append(lost.name)
            done += 1
            needed = next(name for name in lost.after if name in failed)
            announce(f"{lost.name}: not begun, since {needed} failed")
        pending = {job.name for job in waiting} | {job.name for job, _ in active.values()}
        return next((job for job in waiting if pending.isdisjoint(job.after)), None)

    terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no orphans
    try:
        while active or (waiting and affordable()):
            while len(active) < processes and affordable() and (ready := next_ready()) is not None:
                job = ready
                waiting.remove(job)
                slot = min({*range(processes)} - active.keys())
                active[slot] = job, start(job, slot)
                begun += 1
                announce(f"{job.name}: begun, {total - len(waiting)} of {total}")
            time.sleep(0.1)
            for slot in [slot for slot, (_, process) in active.items() if process.poll() is not None]:
                job, process = active.pop(slot)
                code = process.returncode or 0
                job.check(code)
                done += 1
                outcome = "done"
                if code:
                    outcome = "failed"
                    failed.append(job.name)
                left = (time.monotonic() - started) / done * (total - done)
                announce(f"{job.name}: {outcome}, {done} of {total}, about {left / 60:.0f} min to go")
    finally:
        _interrupt([process for _, process in active.values()])
        signal.signal(signal.SIGTERM, terminate)
    if waiting:
        announce(f"the budget is spent, runs left: {len(waiting)}; the same command goes on with them")
    return failed


def _interrupt(processes: Sequence[Process]) -> None:
    """End processes as Ctrl-C would: each run keeps its last checkpoint."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
