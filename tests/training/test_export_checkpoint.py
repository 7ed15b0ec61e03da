"""Checkpoints that are looked at: sampled, evaluated and reported beside the run, which stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import DISTILL_CONFIG, FEW_IMAGES, TEACHER_CONFIG, command, sets
from safetensors.torch import load_file

from shd_diffusion.models.factory import load_model
from shd_diffusion.run_folder import RunFolder, run_name

SHORT = ["train.max_steps=15", "train.batch_size=8", "train.checkpoint_every=5", "train.keep_last=3"]
TINY = ["model.arguments.num_layers=1", "model.arguments.num_attention_heads=2", "train.log_every=5"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 5, 10 and 15."""
    run = tmp_path_factory.mktemp("runs") / "run"
    assert command("train-teacher", TEACHER_CONFIG, "--output", run, *sets(*SHORT, *TINY))[0] == 0
    return run


@pytest.fixture
def stopped(trained: Path, tmp_path: Path) -> Path:
    """The same run, stopped after step 10."""
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("steps", "samples"))
    shutil.rmtree(run / "pipeline")
    shutil.rmtree(run / "checkpoints" / "step-00000015")
    (run / "summary.json").unlink()
    return run


def files(run: Path) -> dict[str, bytes]:
    """All files of a run but those of its checkpoints that were looked at."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and not path.is_relative_to(run / "steps")
    }


def test_a_stopped_run_is_sampled_evaluated_and_reported(stopped: Path) -> None:
    before = files(stopped)
    code, _, errors = command("sample", stopped, *sets(*FEW_IMAGES))
    assert code == 2 and "--checkpoint latest" in errors
    code, _, errors = command("sample", stopped, "--checkpoint", "latest", *sets(*FEW_IMAGES))
    assert code == 0 and errors.splitlines()[-1].endswith(f"evaluate {stopped} --checkpoint latest")
    step = RunFolder(stopped).at_step(10)
    protocol = json.loads((step.samples / "sampling.json").read_text())["protocol"]
    assert (protocol["steps_trained"], protocol["steps_planned"]) == (10, 15)
    average = load_file(stopped / "checkpoints" / "step-00000010" / "ema.safetensors")
    for number, parameter in enumerate(load_model(str(step.path)).parameters()):
        assert torch.equal(parameter, average[str(number)])
    assert [json.loads(line)["step"] for line in step.metrics_file.read_text().splitlines()] == [5, 10]
    assert command("evaluate", stopped, "--checkpoint", "10")[0] == 0
    assert step.evaluation_file.exists() and "fid" in (step.pipeline / "README.md").read_text()
    code, output, _ = command("report", stopped, "--checkpoint", "latest")
    assert code == 0 and "unequal length, in steps: run at step 10: 10 of 15" in output
    page = (step.path / "report.html").read_text()
    assert "run at step 10" in page and f"shd-diffusion sample {stopped} --checkpoint 10" in page
    assert files(stopped) == before


def test_each_step_has_images_of_its_own(trained: Path) -> None:
    run = RunFolder(trained)
    (run.steps / "step-00000010-old").mkdir(parents=True)  # somebody's
    for step in (5, 10):
        assert command("sample", trained, "--checkpoint", step, *sets(*FEW_IMAGES))[0] == 0
    assert command("sample", trained, *sets(*FEW_IMAGES))[0] == 0
    sampled = [run.at_step(5), run.at_step(10), run]
    found = [json.loads((each.samples / "sampling.json").read_text())["protocol"] for each in sampled]
    assert [each["steps_trained"] for each in found] == [5, 10, 15] and "steps_planned" not in found[2]
    assert len({each["pipeline_sha256"] for each in found}) == 3
    assert [run_name(each.path) for each in sampled] == ["run at step 5", "run at step 10", "run"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["sample", "{run}", "--checkpoint", "7"],
            "--checkpoint 7: there is no such checkpoint; there are those of steps 5, 10",
        ),
        (["sample", "{run}", "--checkpoint", "-1"], "--checkpoint -1: give a step, or latest"),
        (
            ["evaluate", "{run}", "--checkpoint", "11"],
            "--checkpoint 11: was not sampled; run `shd-diffusion sample",
        ),
        (["report", "{run}", "--checkpoint", "last"], "--checkpoint last: give a step, or latest"),
    ],
)
def test_what_is_no_checkpoint(arguments: list[str], message: str, stopped: Path) -> None:
    before = files(stopped)
    code, _, errors = command(*(argument.format(run=stopped) for argument in arguments))
    assert code == 2 and message in errors and errors.splitlines()[-1].startswith("error: ")
    assert files(stopped) == before and not (stopped / "steps").exists()


def test_a_damaged_checkpoint_is_passed_over_or_named(stopped: Path) -> None:
    file = stopped / "checkpoints" / "step-00000010" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, _, errors = command("sample", stopped, "--checkpoint", "10", *sets(*FEW_IMAGES))
    assert code == 2 and "damaged (ema.safetensors has changed); choose another --checkpoint" in errors
    assert command("sample", stopped, "--checkpoint", "latest", *sets(*FEW_IMAGES))[0] == 0
    assert RunFolder(stopped).at_step(5).samples.exists()


def test_a_student_shows_what_it_attends_to(runs: Path) -> None:
    run = RunFolder(runs / "kd-shd")
    assert command("sample", run.path, "--checkpoint", "10", *sets(*FEW_IMAGES))[0] == 0
    assert run.at_step(10).attention_file.exists()


def test_a_teacher_that_trained_too_is_shown_as_it_was_then(runs: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    overrides = sets(*SHORT, f"teacher.path={runs / 'teacher'}", "teacher.learning_rate=0.05")
    distill = ("distill", DISTILL_CONFIG, "--output", run.path, *overrides)
    assert command(*distill)[0] == 0
    expected = load_file(run.attention_file)
    run.attention_file.unlink()
    assert command(*distill)[0] == 0
    assert command("sample", run.path, "--checkpoint", "15", *sets(*FEW_IMAGES))[0] == 0
    for file in (run.attention_file, run.at_step(15).attention_file):
        found = load_file(file)
        for name, maps in expected.items():
            torch.testing.assert_close(found[name], maps, rtol=1e-4, atol=1e-6)  # as made, with other kernels
    shutil.rmtree(run.checkpoints)
    run.attention_file.unlink()
    code, _, errors = command(*distill)
    assert code == 0 and "its teacher trained too" in errors and not run.attention_file.exists()
