"""Numbers that go wrong: the step is left out and logged with its cause; too many in a row end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DISTILL_CONFIG, TEACHER_CONFIG, command, sets
from safetensors.torch import load_file

from shd_diffusion.models.denoiser import predict
from shd_diffusion.reporting.runs import read_log
from shd_diffusion.training.objectives import TrainingLoss, _Capture

SHORT = ["train.batch_size=4", "train.log_every=1", "train.checkpoint_every=2", "train.weight_decay=0.1"]
TINY = ["num_layers=1", "num_attention_heads=2"]
TERMS = ["denoise", "variance", "output", "shd"]

Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("nonfinite") / "teacher"
    overrides = sets(*SHORT, *(f"model.arguments.{part}" for part in TINY), "train.max_steps=1")
    assert command("train-teacher", TEACHER_CONFIG, "--output", run, *overrides)[0] == 0
    return run


def distill(teacher: Path, run: Path, steps: int, *more: str) -> tuple[int, str]:
    student = [f"student.arguments.{part}" for part in [*TINY[:1], "num_attention_heads=1", "out_channels=2"]]
    overrides = [*SHORT, *student, f"teacher.path={teacher}", *more]
    arguments = sets(*overrides, f"train.max_steps={steps}")
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", run, *arguments)
    return code, errors


@pytest.fixture(scope="module")
def two_steps(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    assert distill(teacher, run, 2, "train.lr_schedule=constant")[0] == 0
    return run


def spoil(monkeypatch: pytest.MonkeyPatch, first: int, change: Change) -> None:
    """Change the terms of every step from the given one (1-based) on."""
    original = TrainingLoss.__call__

    def spoiled(self: TrainingLoss, model: Any, batch: Any, step: int) -> dict[str, torch.Tensor]:
        terms = original(self, model, batch, step)
        if step + 1 >= first:
            change(terms)
        return terms

    monkeypatch.setattr(TrainingLoss, "__call__", spoiled)


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_left_out(run: Path, before: Path, causes: list[str]) -> None:
    """The last step of three was left out: the weights, the optimiser and the average are those of two steps."""
    assert [entry.get("skipped") for entry in log(run)] == [None, None, causes]
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (
            load_file(folder / "checkpoints" / f"step-0000000{step}" / f"{name}.safetensors")
            for folder, step in ((run, 3), (before, 2))
        )
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_a_prediction_sums_up_to_is_of_no_account_where_no_term_looks_at_it(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def huge(*args: Any) -> torch.Tensor:  # as float16's sums soon are
        return predict(*args).sign() * torch.finfo(torch.float32).max

    monkeypatch.setattr("shd_diffusion.training.objectives.predict", huge)
    none = [f"losses.{term}.weight=0" for term in TERMS[:-1]]
    assert distill(teacher, tmp_path / "run", 1, *none)[0] == 0
    (entry,) = log(tmp_path / "run")
    assert "skipped" not in entry and math.isfinite(entry["gradient_norm"]) and entry["loss"] > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("term", TERMS)
def test_a_step_with_a_term_that_is_not_finite_is_left_out(
    term: str, value: float, teacher: Path, two_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3, lambda terms: terms.update({term: terms[term] * value}))
    assert distill(teacher, tmp_path / "run", 3, "train.lr_schedule=constant")[0] == 0
    assert_left_out(tmp_path / "run", two_steps, [term])
    assert read_log(tmp_path / "run" / "metrics.jsonl").steps.tolist() == [1, 2]


def test_a_gradient_that_is_not_finite_is_named_where_all_terms_are(
    teacher: Path, two_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def root_at_zero(terms: dict[str, torch.Tensor]) -> None:
        terms["output"] = terms["output"] + (terms["output"] - terms["output"].detach()).sqrt()

    spoil(monkeypatch, 3, root_at_zero)
    assert distill(teacher, tmp_path / "run", 3, "train.lr_schedule=constant")[0] == 0
    assert_left_out(tmp_path / "run", two_steps, ["gradient"])


def spoil_second_pass(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """What is captured of the teacher in the second step is not finite."""
    original, calls = _Capture.read, []

    def spoiled(self: _Capture, *given: Any) -> Any:
        captured = original(self, *given)
        calls.append(1)
        if len(calls) == 3:  # teacher and student, and the teacher again
            if part == "records":
                name, record = next(iter(captured.records.items()))
                captured.records[name] = replace(record, query=record.query * math.nan)
            else:
                captured.outputs.update({k: v * math.nan for k, v in captured.outputs.items()})
        return captured

    monkeypatch.setattr(_Capture, "read", spoiled)


def test_attention_that_is_not_finite_is_shd_and_names_the_block(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_second_pass(monkeypatch, "records")
    code, errors = distill(teacher, tmp_path / "run", 3)
    assert code == 0 and "step 2: shd: attention maps or values of block transformer_blocks.0" in errors
    assert [entry.get("skipped") for entry in log(tmp_path / "run")] == [None, ["shd"], None]


def test_features_that_are_not_finite_are_the_term_that_looks_at_them(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_second_pass(monkeypatch, "outputs")
    assert distill(teacher, tmp_path / "run", 3, "losses.vkd.weight=1", "losses.shd.weight=0")[0] == 0
    assert [entry.get("skipped") for entry in log(tmp_path / "run")] == [None, ["vkd"], None]


def test_a_run_of_nothing_but_steps_that_were_left_out_is_not_complete(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 1, lambda terms: terms.update({"output": terms["output"] * math.nan}))
    code, errors = distill(teacher, tmp_path / "run", 3)
    assert code == 3 and "3 steps in a row" in errors
    assert not (tmp_path / "run" / "summary.json").exists()


def test_too_many_in_a_row_end_the_run_at_its_last_good_checkpoint(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, patience = tmp_path / "run", "train.max_skipped_steps=3"
    with monkeypatch.context() as patched:
        spoil(patched, 4, lambda terms: terms.update({"output": terms["output"] * math.nan}))
        code, errors = distill(teacher, run, 9, patience)
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 3 and len(message) == 1  # nothing that the next run of a study would meet as well
    assert all(part in message[0] for part in (str(run), "3 steps in a row", "output", "step-00000002")), (
        message
    )
    assert [entry["step"] for entry in log(run) if "skipped" in entry] == [4, 5, 6]
    assert not (run / "summary.json").exists()
    assert distill(teacher, run, 9, patience)[0] == 0  # the same command goes on from there
    assert [entry["step"] for entry in log(run) if "skipped" in entry] == []
