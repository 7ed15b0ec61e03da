"""Kill commands at random moments, run them again, and compare all files with those of an undisturbed run.

    python eval/kill_and_resume.py --output docs/results/kills.json

Each of SIGKILL, SIGTERM and SIGINT hits each command: training a teacher, distilling with dropout and projectors,
preparing, sampling, evaluating, squeezing, compressing, benchmarking, reporting. A trial has a folder of its own, a
copy of what the command reads, so that paths in files are the same. Times of day and durations are left out of the
comparison.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Annotated, Any

import typer
from try_bad_inputs import CONFIGS, SHORT, sets, write_images, write_vae

from shd_diffusion.environment import describe_environment
from shd_diffusion.files import write_json

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
OF_THE_MOMENT = {"seconds_per_step", "seconds_per_image", "environment", "started", "commit"}
OF_THE_MOMENT |= {"seconds", "per_second", "ratio"}  # of a benchmark

STEPS = (
    "train.max_steps=40",
    "train.batch_size=8",
    "train.checkpoint_every=7",
    "train.log_every=1",
    "train.keep_last=1",
)
LIKE = (
    "teacher.path=teacher",
    "student.arguments.num_layers=1",
    "student.arguments.num_attention_heads=2",
    "student.arguments.dropout=0.1",
    "losses.features.weight=1",
)
TEACHER = ("train-teacher", str(CONFIGS / "teacher.yaml"))
SMALL = ("model.arguments.num_layers=1", "model.arguments.num_attention_heads=4")

COMMANDS: dict[str, list[str]] = {
    "train-teacher": [*TEACHER, "--output", "new", *sets(*STEPS, *SMALL)],
    "distill": ["distill", str(CONFIGS / "distill.yaml"), "--output", "new", *sets(*STEPS, *LIKE)],
    "prepare": ["prepare", "prepare.yaml", "--output", "new"],
    "sample": [
        "sample",
        "teacher",
        "--output",
        "new",
        "--npz",
        *sets("sample.num_images=64", "sample.pass_size=4"),
    ],
    "evaluate": ["evaluate", "teacher"],
    "squeeze": [
        "squeeze",
        "teacher",
        "--heads",
        "2",
        "--samples",
        "8",
        "--timesteps",
        "2",
        "--output",
        "new",
    ],
    "compress": ["compress", "teacher", "--heads", "2", "--output", "new", "--images", "512"],
    "benchmark": [
        "benchmark",
        "teacher",
        "student",
        "--rounds",
        "2",
        "--batch-size",
        "1",
        "--output",
        "new.json",
    ],
    "report": ["report", "teacher", "student", "--output", "new/report.html"],
}


def make_world(world: Path) -> None:
    """What the commands read: a teacher and a student, sampled and evaluated, images and a VAE; and a cache."""
    world.mkdir()
    write_images(world / "images")
    write_vae(world / "vae")
    settings = "prepare: {vae: vae, shard_size: 2, batch_size: 1}"
    (world / "prepare.yaml").write_text(
        f"data: {{name: image_folder, path: images, image_size: 16}}\n{settings}\n"
    )
    for arguments in (
        [*TEACHER, "--output", "teacher", *sets(*SHORT, *SMALL)],
        ["distill", str(CONFIGS / "distill.yaml"), "--output", "student", *sets(*SHORT, *LIKE)],
        ["sample", "teacher", "student", *sets("sample.num_images=64", "sample.num_inference_steps=2")],
        ["evaluate", "teacher", "student"],
    ):
        ended(start(arguments, world), 0)
    for kept in ("evaluation", "cache/shd-diffusion/references"):  # these are for `evaluate` to make
        shutil.rmtree(world / "teacher" / kept, ignore_errors=True)
        shutil.rmtree(world / kept, ignore_errors=True)


# --- commands in processes of their own --------------------------------------------------------------------------

SERVER = multiprocessing.get_context("forkserver")  # which has imported torch before
SERVER.set_forkserver_preload(
    [
        f"shd_diffusion.{name}"
        for name in (
            "analysis.measure_teacher",
            "benchmark.run_benchmark",
            "compress_run",
            "data.prepare",
            "evaluation.evaluate_run",
            "reporting",
            "sampling.sample_run",
            "training.run",
        )
    ]
)


def start(arguments: list[str], folder: Path) -> BaseProcess:
    """A command line in a folder, in a process of its own."""
    process = SERVER.Process(target=_run, args=(arguments, str(folder)))
    process.start()
    return process


def ended(process: BaseProcess, wanted: int | None = None) -> int:
    """The exit code of a process; it must be the one that is wanted, if any."""
    process.join(600)
    if process.exitcode is None:
        process.kill()
    if process.exitcode is None or wanted not in (None, process.exitcode):
        raise RuntimeError(f"a command ended with {process.exitcode}")
    return process.exitcode


def _run(arguments: list[str], folder: str) -> None:
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
    with Path("output.txt").open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["shd-diffusion", *arguments]
    from shd_diffusion.cli import main as command_line

    try:
        command_line()
    finally:  # multiprocessing leaves them out
        atexit._run_exitfuncs()


# --- what is compared --------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """A hash of all that each file says, by its path, but for what is of the moment."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name not in (".lock", "output.txt") and not name.startswith("cache/"):
            found[name] = hashlib.sha256(_lasting(path)).hexdigest()
    return found


def _lasting(path: Path) -> bytes:
    if path.suffix not in (".json", ".jsonl"):
        return path.read_bytes()
    text = path.read_text(encoding="utf-8")
    parts = text.splitlines() if path.suffix == ".jsonl" else [text]
    trees = [_without_the_moment(json.loads(part)) for part in parts]
    if path.name == "environment.json":
        trees = []
    if path.name == "manifest.json":  # whose own checksum covers the files'
        trees = [{k: v for k, v in tree.items() if k != "sha256"} for tree in trees]
    return json.dumps(trees).encode()


def _without_the_moment(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_the_moment(value) for key, value in tree.items() if key not in OF_THE_MOMENT}
    return [_without_the_moment(each) for each in tree] if isinstance(tree, list) else tree


# --- trials ------------------------------------------------------------------------------------------------------


def hit(arguments: list[str], world: Path, folder: Path, wait: float, signum: int) -> int | None:
    """The exit code of a command that was hit after so many seconds; None where it had ended before."""
    shutil.copytree(world, folder)
    process = start(arguments, folder)
    process.join(wait)
    if process.exitcode is not None or process.pid is None:
        return None
    os.kill(process.pid, signum)
    return ended(process)


def main(
    output: Annotated[Path | None, typer.Option(help="A JSON file for the result.")] = None,
    kills: Annotated[int, typer.Option(help="Hits of each command; the signals take turns.")] = 6,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Hit every command, run it again, and end with 1 if any file is another than undisturbed."""
    draws = random.Random(seed)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        world = Path(place) / "world"
        make_world(world)
        for name, arguments in COMMANDS.items():
            whole = Path(place) / f"{name}-whole"
            shutil.copytree(world, whole)
            began = time.monotonic()
            ended(start(arguments, whole), 0)
            lasts, expected = time.monotonic() - began, contents(whole)
            for number in range(kills):
                signum, code = SIGNALS[number % len(SIGNALS)], None
                while code is None:
                    folder = Path(place) / "trial"
                    shutil.rmtree(folder, ignore_errors=True)
                    wait = draws.uniform(0, lasts)
                    code = hit(arguments, world, folder, wait, signum)
                again = ended(start(arguments, folder))
                found = contents(folder)
                other = sorted(
                    key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)
                )
                results.append(
                    {
                        "command": name,
                        "signal": signum.name,
                        "after": round(wait / lasts, 3),
                        "exit_code": code,
                        "again": again,
                        "other_files": other,
                    }
                )
                typer.echo(json.dumps(results[-1]))
    wrong = [each for each in results if each["again"] or each["other_files"]]
    typer.echo(f"{len(results)} kills, {len(results) - len(wrong)} ended in the files of an undisturbed run")
    if output is not None:
        counts = Counter(f"{each['command']} {each['signal']}" for each in results)
        about = {"kills": len(results), "as_undisturbed": len(results) - len(wrong), "hits": dict(counts)}
        write_json(output, {**about, "trials": results, "environment": describe_environment()})
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
