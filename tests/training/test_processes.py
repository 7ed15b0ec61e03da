"""The same run whatever it is dealt out to: forward passes, processes, shards; and however it is launched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import DISTILL_CONFIG, TEACHER_CONFIG, command, sets
from forks import launch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
VALIDATION = ["train.validation.every=2", "train.validation.num_images=0", "train.validation.loss_images=9"]
STEPS = ["train.max_steps=4", "train.log_every=1", "train.warmup_steps=1", "train.ema_decay=0.5", *VALIDATION]
TEACHER = ["model.arguments.num_layers=2", "model.arguments.num_attention_heads=4", "train.batch_size=8"]
STUDENT = ["student.arguments.num_layers=2", "student.arguments.num_attention_heads=2"]
ALONE = ["train.batch_size=8", "train.num_processes=1"]
HALVES = {
    "accumulated": ["train.batch_size=8", "train.micro_batch_size=4"],
    "in threes": ["train.batch_size=8", "train.micro_batch_size=3"],
    "two": ["train.batch_size=8", "train.checkpoint_every=2"],
    "maps alone": ["train.batch_size=8", "losses.denoise.weight=0", "losses.output.weight=0"],
    "sharded": [
        "train.batch_size=8",
        "train.num_processes=2",
        "train.shard=true",
        "train.checkpoint_every=2",
    ],
}

MATCHED = ["losses.shd.pairing=matched", "losses.shd.calibration_batches=1"]
SQUEEZED = ["train.batch_size=8", "train.max_steps=2", "student.init=squeeze"]

# What each of the launched processes does: the runs in turn, the last of them interrupted after its first half.
TOGETHER = """
import json, shutil, sys
from pathlib import Path
from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.processes import processes
from shd_diffusion.training.run import train

config, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
for output, overrides in runs.items():
    train(read_config(config, DistillConfig, overrides), Path(output), "the test's config")
processes().wait_for_everyone()
if processes().is_main_process:
    shutil.copytree(output, output + "-resumed")
    for part in ("pipeline", "checkpoints/step-00000004"):
        shutil.rmtree(Path(output + "-resumed") / part)
    (Path(output + "-resumed") / "summary.json").unlink()
processes().wait_for_everyone()
train(read_config(config, DistillConfig, overrides), Path(output + "-resumed"), "the test's config")
"""


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors")


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")  # once a worker, whatever tests of other files come between
def dealt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one config: alone, accumulated, in two processes, sharded, and sharded with an interruption."""
    folder = tmp_path_factory.mktemp("dealt")
    common = [*STEPS, *STUDENT, f"teacher.path={folder / 'teacher'}"]
    assert (
        command("train-teacher", TEACHER_CONFIG, "--output", folder / "teacher", *sets(*STEPS, *TEACHER))[0]
        == 0
    )
    alone = {"alone": ALONE, "squeezed alone": [*ALONE, *SQUEEZED], "matched alone": [*ALONE, *MATCHED]}
    alone |= {name: HALVES[name] for name in ("accumulated", "in threes")}
    for name, overrides in alone.items():
        run = folder / name
        assert command("distill", DISTILL_CONFIG, "--output", run, *sets(*common, *overrides))[0] == 0
    script = folder / "together.py"
    script.write_text(TOGETHER)
    runs = {str(folder / "squeezed"): [*common, *SQUEEZED]}
    runs[str(folder / "matched")] = [*common, *HALVES["sharded"], *MATCHED]
    runs |= {str(folder / name): [*common, *HALVES[name]] for name in ("two", "maps alone", "sharded")}
    launch(2, script, DISTILL_CONFIG, json.dumps(runs))
    return folder


@pytest.mark.parametrize("name", [name for name in HALVES if name != "maps alone"])
def test_halves_of_a_batch_make_the_same_run(name: str, dealt: Path) -> None:
    """Two forward passes or two processes with half the batch: the same losses and gradients at every step."""
    whole, halves = log(dealt / "alone"), log(dealt / name)
    assert [entry["step"] for entry in halves] == [1, 2, 3, 4]
    for ours, theirs in zip(halves, whole, strict=True):
        assert ours["images"] == theirs["images"]
        assert set(ours["terms"]) == {"denoise", "output", "shd"}
        for term, figures in theirs["terms"].items():
            assert ours["terms"][term]["value"] == pytest.approx(figures["value"], rel=1e-5), term
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-5)
        assert len(ours["shd_by_block"]) == 2
        assert ours["shd_by_block"] == pytest.approx(theirs["shd_by_block"], rel=1e-5)
        assert ("validation" in ours) == (ours["step"] in (2, 4))
        if "validation" in ours:  # in passes of other sizes, dealt to others
            assert set(ours["validation"]["terms"]) == {"denoise", "output", "shd"}
            for kind in ("terms", "teacher"):
                assert ours["validation"][kind] == pytest.approx(theirs["validation"][kind], rel=1e-5)
    ours, theirs = weights(dealt / name), weights(dealt / "alone")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if not key.endswith(
            "to_k.bias"
        ):  # cancels in the softmax: Adam takes steps along mere rounding errors
            torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-6)


def test_a_student_is_squeezed_once_for_all_processes(dealt: Path) -> None:
    """From the same squeezed weights, and so the same run; of other weights the first loss would be another."""
    whole, halves = log(dealt / "squeezed alone"), log(dealt / "squeezed")
    for ours, theirs in zip(halves, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert halves[0]["loss"] != pytest.approx(log(dealt / "alone")[0]["loss"], rel=1e-2)


def test_a_run_changes_over_to_another_number_of_processes(dealt: Path, tmp_path: Path) -> None:
    """Two processes to its half, one from there on: the same run as any other."""
    run = tmp_path / "run"
    shutil.copytree(dealt / "two", run)
    shutil.rmtree(run / "pipeline")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "summary.json").unlink()
    overrides = sets(*STEPS, *STUDENT, *HALVES["two"], f"teacher.path={dealt / 'teacher'}")
    assert command("distill", DISTILL_CONFIG, "--output", run, *overrides)[0] == 0
    changed, whole = log(run), log(dealt / "alone")
    assert [entry["images"] for entry in changed] == [entry["images"] for entry in whole]
    for first, second in zip(changed, whole, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)


def test_four_processes_take_the_same_first_step(dealt: Path, tmp_path: Path) -> None:
    script = tmp_path / "four.py"
    script.write_text(TOGETHER.partition("processes().wait_for_everyone()")[0])
    overrides = [
        *STEPS,
        *STUDENT,
        f"teacher.path={dealt / 'teacher'}",
        "train.batch_size=8",
        "train.max_steps=1",
    ]
    launch(4, script, DISTILL_CONFIG, json.dumps({str(tmp_path / "run"): overrides}))
    first, second = log(tmp_path / "run")[0], log(dealt / "alone")[0]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["gradient_norm"] == pytest.approx(second["gradient_norm"], rel=1e-5)


def test_a_loss_on_maps_alone_trains_in_two_processes(dealt: Path) -> None:
    """Parameters behind the last map have a gradient of 0 there: none at all, and they would wait for it for ever."""
    entries = log(dealt / "maps alone")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert all(set(entry["terms"]) == {"shd"} for entry in entries)


def test_a_sharded_student_is_trained_after_it_was_looked_at(dealt: Path) -> None:
    """By the calibration of matched pairs, a forward pass that no backward pass follows."""
    ours, theirs = log(dealt / "matched"), log(dealt / "matched alone")
    plans = [
        json.loads((dealt / name / "merge_plans.json").read_text()) for name in ("matched", "matched alone")
    ]
    assert plans[0] == plans[1]
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], rel=1e-5)


def test_a_sharded_run_is_resumed_with_the_same_weights(dealt: Path) -> None:
    ours, theirs = weights(dealt / "sharded-resumed"), weights(dealt / "sharded")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [[entry["loss"] for entry in log(dealt / name)] for name in ("sharded-resumed", "sharded")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_run_may_be_dealt_out_otherwise_when_it_goes_on(dealt: Path) -> None:
    """From sharded over two processes to whole in one, with what trades time for memory."""
    run, free = dealt / "otherwise", ["train.gradient_checkpointing=true", "losses.shd.chunk_rows=3"]
    shutil.copytree(dealt / "sharded", run)
    shutil.rmtree(run / "pipeline")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "summary.json").unlink()
    arguments = sets(*STEPS, *STUDENT, *ALONE, f"teacher.path={dealt / 'teacher'}", *free)
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", run, *arguments)
    assert code == 0, errors
    losses = [[entry["loss"] for entry in log(dealt / name)] for name in ("otherwise", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_sharded_run_leaves_what_any_other_does(dealt: Path) -> None:
    names = [
        {
            str(path.relative_to(dealt / run))
            for path in (dealt / run).rglob("*")
            if "step-00000002" not in str(path)
        }
        for run in ("sharded", "alone")
    ]
    assert names[0] == names[1] and "attention.safetensors" in names[0]
    summaries = [json.loads((dealt / run / "summary.json").read_text()) for run in ("sharded", "alone")]
    changing = {"name"}
    assert all(summaries[0][key] == summaries[1][key] for key in summaries[1].keys() - changing)


def test_accelerate_launch_is_the_same_run(dealt: Path, tmp_path: Path) -> None:
    arguments = sets(*STEPS, *STUDENT, *ALONE, f"teacher.path={dealt / 'teacher'}")
    launcher = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    launcher += ["--mixed_precision", "no", str(ROOT / "pipelines" / "distill.py")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *launcher),
            *(str(DISTILL_CONFIG), "--output", str(tmp_path / "run"), *arguments),
        ],
        env={**os.environ, **threads, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = weights(tmp_path / "run"), weights(dealt / "alone")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.num_processes=2", ["train.num_processes", "asks for 2", "1 were launched", "torchrun"]),
        ("train.shard=true", ["train.shard", "one process"]),
    ],
)
def test_a_launch_that_does_not_fit_writes_nothing(override: str, says: list[str], tmp_path: Path) -> None:
    arguments = sets(*STEPS, *TEACHER, "train.validation.every=0", override)
    code, _, errors = command("train-teacher", TEACHER_CONFIG, "--output", tmp_path / "run", *arguments)
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and all(part in message[0] for part in says), errors
    assert not (tmp_path / "run").exists()
