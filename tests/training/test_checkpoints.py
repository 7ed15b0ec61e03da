"""Runs that are killed, run out of disk, or find a damaged checkpoint."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import TEACHER_CONFIG, command, sets, start
from safetensors.torch import load_file

SHORT = ["train.max_steps=40", "train.batch_size=8", "train.checkpoint_every=5", "train.log_every=1"]
TINY = [f"model.arguments.{key}={value}" for key, value in (("num_layers", 1), ("num_attention_heads", 2))]
ARGUMENTS = [str(part) for part in ["train-teacher", TEACHER_CONFIG, *sets(*SHORT, *TINY)]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors")


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert command(*ARGUMENTS, "--output", run)[0] == 0
    return run


def assert_same_run(run: Path, whole: Path) -> None:
    ours, theirs = weights(run), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [
        [json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, whole)
    ]
    assert [e["step"] for e in logs[0]] == list(range(1, 41))
    assert [e["loss"] for e in logs[0]] == [e["loss"] for e in logs[1]]


def test_killed_again_and_again_it_ends_with_the_same_weights(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (5, 20):
        process = start(*ARGUMENTS, "--output", run)
        wait_for(run / "checkpoints" / f"step-{step:08d}", process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert command(*ARGUMENTS, "--output", run)[0] == 0
    assert_same_run(run, uninterrupted)
    assert not [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "missing file", "no manifest"])
def test_a_damaged_checkpoint_is_reported_and_passed_over(
    damage: str, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "pipeline")
    (run / "summary.json").unlink()
    newest = run / "checkpoints" / "step-00000040"
    file = newest / "model.safetensors"
    content = bytearray(file.read_bytes())
    match damage:
        case "truncated":
            file.write_bytes(content[:-10])
        case "flipped bit":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "missing file":
            file.unlink()
        case "no manifest":
            (newest / "manifest.json").unlink()
    code, _, errors = command(*ARGUMENTS, "--output", run)
    assert code == 0 and "step-00000040: damaged" in errors
    assert_same_run(run, uninterrupted)


def test_only_the_last_and_the_chosen_checkpoints_stay(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert command(*ARGUMENTS, "--output", run, *sets("train.keep_last=1", "train.keep_every=20"))[0] == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000020", "step-00000040"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(uninterrupted: Path, tmp_path: Path) -> None:
    """The size that a file may have stands in for the space that is left: it shrinks once a checkpoint is there."""
    run = tmp_path / "run"
    process = start(*ARGUMENTS, "--output", run)
    wait_for(run / "checkpoints" / "step-00000005", process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1 and "Traceback" not in errors
    assert "cannot be written" in errors and "the same command" in errors.lower()
    assert command(*ARGUMENTS, "--output", run)[0] == 0
    assert_same_run(run, uninterrupted)
