"""Runs that are killed, run out of disk, or find a damaged checkpoint."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import TEACHER_CONFIG, command, sets, start
from forks import Fork
from safetensors.torch import load_file

from shd_diffusion.config import TrainTeacherConfig, read_config
from shd_diffusion.files import json_sha256, locked
from shd_diffusion.run_folder import RunFolder

SHORT = ["train.max_steps=40", "train.batch_size=8", "train.checkpoint_every=5", "train.log_every=1"]
TINY = [f"model.arguments.{key}={value}" for key, value in (("num_layers", 1), ("num_attention_heads", 2))]
ARGUMENTS = [str(part) for part in ["train-teacher", TEACHER_CONFIG, *sets(*SHORT, *TINY)]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors")


def wait_for(path: Path, process: Fork) -> None:
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


def test_an_extended_run_learns_at_the_rate_of_the_longer_schedule(tmp_path: Path) -> None:
    rates = {}
    for name, lengths in (("extended", (3, 6)), ("whole", (6,))):
        for steps in lengths:
            more = sets(f"train.max_steps={steps}", "train.lr_schedule=cosine", "train.warmup_steps=1")
            assert command(*ARGUMENTS, "--output", tmp_path / name, *more)[0] == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rates[name] = [json.loads(line)["learning_rate"] for line in lines]
    assert rates["extended"][3:] == rates["whole"][3:] and rates["whole"][3] > 0


def test_a_stopped_run_is_finished_where_it_is_and_goes_on_later(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, _, errors = command(*ARGUMENTS, "--output", run, "--finish")
    assert code == 2 and "--finish: has no checkpoint yet" in errors and not run.exists()
    process = start(*ARGUMENTS, "--output", run)
    wait_for(run / "checkpoints" / "step-00000010", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    last = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    code, _, errors = command("sample", run)
    assert code == 2 and "with --finish to save what its last checkpoint has" in errors
    assert command(*ARGUMENTS, "--output", run, "--finish")[0] == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == last < 40
    average = load_file(run / "checkpoints" / f"step-{last:08d}" / "ema.safetensors")
    exported = sorted(tensor.double().norm().item() for tensor in weights(run).values())
    assert exported == sorted(tensor.double().norm().item() for tensor in average.values())
    assert command(*ARGUMENTS, "--output", run)[0] == 0
    assert_same_run(run, uninterrupted)


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


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped bit", "missing file", "no manifest", "a digit of the manifest"]
)
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
        case "a digit of the manifest":
            text = (newest / "manifest.json").read_text()
            (newest / "manifest.json").write_text(text.replace('"last_epoch": 40', '"last_epoch": 41'))
    code, _, errors = command(*ARGUMENTS, "--output", run)
    assert code == 0 and "step-00000040: damaged" in errors
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("trick", ["renamed beyond the end", "of another seed"])
def test_checkpoints_of_another_step_or_run_are_passed_over(
    trick: str, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    shutil.rmtree(run / "pipeline")
    (run / "summary.json").unlink()
    folder = run / "checkpoints"
    match trick:
        case "renamed beyond the end":
            (folder / "step-00000040").rename(folder / "step-00000099")
        case "of another seed":
            other = tmp_path / "other"
            assert command(*ARGUMENTS, "--output", other, *sets("seed=1"))[0] == 0
            shutil.rmtree(folder / "step-00000040")
            shutil.copytree(other / "checkpoints" / "step-00000040", folder / "step-00000040")
    code, _, errors = command(*ARGUMENTS, "--output", run)
    assert code == 0 and "using the checkpoint before it" in errors
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("fault", ["damaged", "of another run", "renamed"])
def test_where_no_checkpoint_can_be_used_nothing_is_begun_anew(
    fault: str, uninterrupted: Path, tmp_path: Path
) -> None:
    """It would take the log with it, and keep none of its own checkpoints beside later ones."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "summary.json").unlink()
    folder = run / "checkpoints"
    if fault == "renamed":
        (folder / "step-00000040").rename(tmp_path / "kept")
        (folder / "step-00000035").rename(folder / "step-00000040")
        (tmp_path / "kept").rename(folder / "step-00000035")
    for path in folder.iterdir():
        manifest = json.loads((path / "manifest.json").read_text())
        if fault == "damaged":
            (path / "ema.safetensors").write_bytes(b"")
        elif fault == "of another run":
            del manifest["sha256"]
            manifest["run"] = "0" * 64
            (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": json_sha256(manifest)}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, _, errors = command(*ARGUMENTS, "--output", run)
    assert code == 2 and f"step-00000035: {fault}" in errors and "no other checkpoint can be used" in errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    shutil.rmtree(folder)
    assert command(*ARGUMENTS, "--output", run)[0] == 0
    assert_same_run(run, uninterrupted)


def test_a_run_is_the_same_to_a_later_version_that_has_more_keys() -> None:
    class Later(TrainTeacherConfig):
        another: int = 3

    config = read_config(TEACHER_CONFIG, TrainTeacherConfig)
    folder = RunFolder(Path("nowhere"))
    later = Later.model_validate(config.model_dump(by_alias=True))
    assert folder.identity(later) == folder.identity(config)
    assert folder.identity(later.model_copy(update={"another": 4})) != folder.identity(config)
    assert folder.identity(config.model_copy(update={"seed": 7})) != folder.identity(config)


def test_other_names_beside_the_checkpoints_are_none_of_ours(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "summary.json").unlink()
    for name in ("step-old", "step-00000035.bak", "step-\u00b28", "step-00000040 (copy)"):
        shutil.copytree(run / "checkpoints" / "step-00000035", run / "checkpoints" / name)
    assert command(*ARGUMENTS, "--output", run)[0] == 0
    assert_same_run(run, uninterrupted)
    assert len(list((run / "checkpoints").iterdir())) == 6


def test_a_damaged_checkpoint_does_not_count_among_the_last(uninterrupted: Path, tmp_path: Path) -> None:
    """With keep_last=1 the one that is written next stays, though a damaged one has a later step."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "summary.json").unlink()
    (run / "checkpoints" / "step-00000040" / "ema.safetensors").unlink()
    assert (
        command(*ARGUMENTS, "--output", run, *sets("train.keep_last=1", "train.checkpoint_every=39"))[0] == 0
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000040"]
    assert_same_run(run, uninterrupted)


def test_a_run_goes_on_to_more_steps_and_never_to_fewer(uninterrupted: Path, tmp_path: Path) -> None:
    """With a constant learning rate, extended it is the run that was longer from the start."""
    constant, run = sets("train.lr_schedule=constant"), tmp_path / "run"
    assert command(*ARGUMENTS, "--output", run, *constant, *sets("train.max_steps=25"))[0] == 0
    assert command(*ARGUMENTS, "--output", run, *constant)[0] == 0
    assert command(*ARGUMENTS, "--output", tmp_path / "at once", *constant)[0] == 0
    assert_same_run(run, tmp_path / "at once")
    assert json.loads((run / "summary.json").read_text())["steps"] == 40
    code, _, errors = command(*ARGUMENTS, "--output", run, *constant, *sets("train.max_steps=39"))
    assert code == 2 and "train.max_steps" in errors and "grow" in errors


def test_what_changes_no_weights_may_change_and_is_kept(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    free = ["train.log_every=2", "train.keep_last=3", "train.micro_batch_size=4", "sample.num_images=77"]
    assert command(*ARGUMENTS, "--output", run, *sets(*free, "train.trackers=[tensorboard]"))[0] == 0
    config = (run / "config.yaml").read_text()
    assert all(line in config for line in ("log_every: 2", "keep_last: 3", "num_images: 77", "- tensorboard"))
    code, _, errors = command(*ARGUMENTS, "--output", run, *sets("train.batch_size=4"))
    assert code == 2 and "`train.batch_size` is 8 there, 4 now" in errors


def test_killed_while_the_folder_is_made_the_same_command_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.yaml.tmp-1").write_text("seed")
    (run / ".lock").touch()
    assert command(*ARGUMENTS, "--output", run, *sets("train.max_steps=1"))[0] == 0


def test_two_commands_do_not_train_in_one_folder(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run):
        code, _, errors = command(*ARGUMENTS, "--output", run)
    assert code == 2 and "another command is at work in this folder" in errors
    assert [path.name for path in run.iterdir()] == [".lock"]
    assert command(*ARGUMENTS, "--output", run)[0] == 0  # a lock that nobody holds is none
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    signum: signal.Signals, uninterrupted: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(*ARGUMENTS, "--output", run, *sets("train.checkpoint_every=1000"))
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, errors
    assert "interrupted after step" in errors and "Traceback" not in errors
    (checkpoint,) = (run / "checkpoints").iterdir()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert checkpoint.name == f"step-{last:08d}"
    assert command(*ARGUMENTS, "--output", run)[0] == 0
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("workers", [0, 2])
def test_dropout_is_resumed_exactly(workers: int, tmp_path: Path) -> None:
    more = sets("model.arguments.dropout=0.1", f"data.num_workers={workers}", "train.max_steps=20")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert command(*ARGUMENTS, "--output", whole, *more)[0] == 0
    shutil.copytree(whole, run)
    for later in ("step-00000015", "step-00000020"):
        shutil.rmtree(run / "checkpoints" / later, ignore_errors=True)
    for name in ("summary.json", "config.yaml"):
        (run / name).unlink()
    shutil.copy(whole / "config.yaml", run)
    assert command(*ARGUMENTS, "--output", run, *more)[0] == 0
    first, second = weights(run), weights(whole)
    assert all(torch.equal(first[name], second[name]) for name in first)


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
