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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from shd_diffusion.config import RunConfig, TrainTeacherConfig, read_config
from shd_diffusion.errors import UserError
from shd_diffusion.files import json_sha256, locked, read_json, sha256, write_json
from shd_diffusion.models.factory import find_model_folder
from shd_diffusion.progress import announce
from shd_diffusion.protocol import is_of_step
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sample_folder import read_summary
from shd_diffusion.study.cluster import PATIENCE, Submitted, Work, make_executor
from shd_diffusion.study.config import Budget, Place, Planned, StudyConfig, compressed_folder, teacher_of

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

    def to_mend(self, code: int) -> str | None:
        """What it asks a person to fix, which every other run would ask too; None where it ended otherwise."""
        if code != UserError.exit_code:
            return None
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        says = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return says[-1] if says else f"{self.log}: {self.name} could not begin"


@dataclass(slots=True)
class Ended:
    """How jobs ended: the names of those that failed, and what a person must fix before any can go on."""

    failed: list[str] = field(default_factory=list)
    to_mend: str | None = None


Start: TypeAlias = Callable[[Job, int], Process]
"""Begins a job in one of so many slots."""


def carry_out(
    study: StudyConfig, planned: Sequence[Planned], known: Collection[Place], output: Path, command_line: str
) -> Ended:
    """Run what is missing, within the budget; an interrupted run goes on from its last checkpoint.

    Args:
        known: runs that were made elsewhere, and are made here only where another one begins with them.
        output: the study's folder, which gets `logs/`.
        command_line: the module whose `app` carries out the commands.

    Returns:
        How the runs ended. Where one asks a person to fix something, no other is begun after it.

    Raises:
        UserError: the teacher or a model that is made of it failed, there is no such cluster, or another command is at
            work on the study.
    """
    start = _starter(study, output, command_line)
    with locked(output / "logs"):
        return _carry_out(study, planned, known, output, start)


def _carry_out(
    study: StudyConfig, planned: Sequence[Planned], known: Collection[Place], output: Path, start: Start
) -> Ended:
    def job(name: str, run: RunFolder, config: RunConfig, train: list[str]) -> Job:
        log = output / "logs" / f"{name.replace(' seed ', ' seed-').replace(' ', '/')}.log"
        return Job(name, _missing(run, config, train), log)

    path = teacher_of(study)
    if study.teacher is not None:
        config = read_config(Path(study.teacher), TrainTeacherConfig)
        run = RunFolder(Path(path))
        run.check(config)
        teacher = job("teacher", run, config, ["train-teacher", study.teacher])
        ended = _run_all([teacher], Budget(), 1, start)
        if ended.to_mend or ended.failed:
            raise UserError(
                ended.to_mend or f"{teacher.log}: the teacher's training failed; the log says why"
            )
    made = [_compression(study, path, name, output) for name in study.compressed]
    ended = _run_all(made, Budget(), 1, start)
    if ended.to_mend or ended.failed:
        names = ", ".join(ended.failed)
        raise UserError(
            ended.to_mend or f"{output / 'logs'}: models could not be made ({names}); their logs say why"
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
        UserError: it is, but made by other options or of another teacher.
    """
    folder, options = compressed_folder(output, name), study.compressed[name]
    asked = {**options, "teacher": teacher, "teacher_sha256": _weights_sha256(teacher)}
    note = folder.with_name(f"{name}.json")  # what it was made by, for the next command
    if not folder.exists():
        write_json(note, asked)
    elif note.exists() and (before := read_json(note)) != asked:
        raise UserError(
            f"compressed.{name}: {folder} was made with {before}, not {asked}; name it otherwise, or delete it"
        )
    command = ["compress", teacher, "--output", str(folder)]
    for key, value in options.items():
        if value is not False:
            command += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    log = output / "logs" / f"compress-{name}.log"
    return Job(f"compress {name}", [] if folder.exists() else [command], log)


def _weights_sha256(model: str) -> str | None:
    """A hash of the files of a model's weights; None of one on the hub."""
    folder = find_model_folder(Path(model))
    if folder is None:
        return None
    return json_sha256({file.name: sha256(file) for file in folder.glob("*.safetensors")})


def _sets(overrides: Iterable[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def _missing(run: RunFolder, config: RunConfig, train: list[str]) -> list[list[str]]:
    """The commands that complete a run. Samples and metrics of an earlier step do not count: `sample` says of them
    that their folder is to be deleted."""
    sampled, path = read_summary(run.samples), str(run.path)
    of_now = sampled is not None and is_of_step(sampled.protocol, config.train.max_steps)
    commands = []
    if not run.is_complete(config):
        commands.append([*train, "--output", path])
    if sampled is None or not of_now or sampled.num_images < config.sample.num_images:
        commands.append(["sample", path])
    if commands or not run.is_evaluated():
        commands.append(["evaluate", path])
    return commands


# --- processes -----------------------------------------------------------------------------------------------


def _run_all(jobs: Iterable[Job], budget: Budget, processes: int, start: Start) -> Ended:
    """Run jobs until all are done, the budget is spent, or a person must fix something; what has begun ends."""
    waiting = deque(job for job in jobs if job.commands)
    total, begun, done, started = len(waiting), 0, 0, time.monotonic()
    active: dict[int, tuple[Job, Process]] = {}  # by slot, of as many as there are processes
    ended = Ended()
    failed = ended.failed

    def affordable() -> bool:
        hours = (time.monotonic() - started) / 3600
        in_time = budget.hours is None or hours < budget.hours
        return ended.to_mend is None and in_time and (budget.runs is None or begun < budget.runs)

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

    ends = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) != signal.SIG_IGN]
    before = {each: signal.signal(each, signal.default_int_handler) for each in ends}  # as Ctrl-C: no orphans
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
                ended.to_mend = job.to_mend(code) or ended.to_mend
                done += 1
                outcome = "done"
                if code:
                    outcome = "failed"
                    failed.append(job.name)
                left = (time.monotonic() - started) / done * (total - done)
                announce(f"{job.name}: {outcome}, {done} of {total}, about {left / 60:.0f} min to go")
    finally:
        _interrupt([process for _, process in active.values()])
        for each, handler in before.items():
            signal.signal(each, handler)
    if waiting and ended.to_mend is None:
        announce(f"the budget is spent, runs left: {len(waiting)}; the same command goes on with them")
    return ended


def _interrupt(processes: Sequence[Process]) -> None:
    """End processes as Ctrl-C would: each run keeps its last checkpoint."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    until = time.monotonic() + PATIENCE
    for process in processes:
        try:
            process.wait(timeout=max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
