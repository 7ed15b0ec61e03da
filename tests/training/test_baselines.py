"""Baselines in a run: trained with the student, kept in checkpoints, resumed, never exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import DISTILL_CONFIG, command, sets
from safetensors.torch import load_file

WITH_PARAMETERS = ("features", "vkd", "attention_output", "aligner", "norm_direction", "contrastive", "acam")
NAMES = (*WITH_PARAMETERS, "attention_mse", "minilm", "affinity")
OPTIONS = [
    "train.max_steps=4", "train.batch_size=8", "train.checkpoint_every=2", "train.log_every=1",
    "losses.shd.weight=0", *(f"losses.{name}.weight=0.5" for name in NAMES),
]  # fmt: skip
EXPORTED = "pipeline/denoiser/diffusion_pytorch_model.safetensors"


def distill(runs: Path, output: Path, *more: str) -> tuple[int, str, str]:
    overrides = sets(f"teacher.path={runs / 'teacher'}", *OPTIONS, *more)
    return command("distill", DISTILL_CONFIG, "--output", output, *overrides)


@pytest.fixture(scope="module")
def run(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baselines") / "run"
    assert distill(runs, path)[0] == 0
    return path


def log(run: Path) -> list[dict]:
    entries = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if k != "seconds_per_step"} for entry in entries]


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08d}/loss.safetensors")


def test_every_baseline_is_a_term(run: Path) -> None:
    for entry in log(run):
        assert set(entry["terms"]) == {"denoise", "output", *NAMES}
        assert all(entry["terms"][name]["weighted"] == entry["terms"][name]["value"] / 2 for name in NAMES)


def test_projectors_train_and_are_counted(run: Path) -> None:
    before, after = state(run, 2), state(run, 4)
    moved = {name.split(".")[0] for name in before if (before[name] != after[name]).any()}
    assert moved == set(WITH_PARAMETERS)
    linear = 40 * 96 + 96
    projectors = 6 * (5 * linear + 40 * 96)  # all with biases, but for vkd's
    projectors += 6 * (96 * (2 * 32 + 96) + 2 * 6 * 96)  # acam's attention and selection
    summary = json.loads((run / "summary.json").read_text())
    assert summary["extra_parameters"] == projectors + (6 * 12) * (6 * 5)


def test_the_exported_student_has_none_of_them(runs: Path, run: Path) -> None:
    exported = load_file(run / EXPORTED)
    assert exported.keys() == load_file(runs / "kd-shd" / EXPORTED).keys()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["parameters"] == sum(tensor.numel() for tensor in exported.values())


def test_resume_is_bit_identical(runs: Path, run: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step-00000004")
    shutil.rmtree(again / "pipeline")
    (again / "summary.json").unlink()
    assert distill(runs, again)[0] == 0
    for first, second in (
        (state(run, 4), state(again, 4)),
        (load_file(run / EXPORTED), load_file(again / EXPORTED)),
    ):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert log(again) == log(run)


def test_the_student_starts_as_without_them(runs: Path, run: Path, tmp_path: Path) -> None:
    """Projectors take nothing from the generators that the other variants of the seed draw from."""
    alone = [f"losses.{name}.weight=0" for name in NAMES]
    assert distill(runs, tmp_path / "kd", *alone, "train.max_steps=1")[0] == 0
    kd, all_of_them = log(tmp_path / "kd")[0]["terms"], log(run)[0]["terms"]
    assert (kd["denoise"]["value"], kd["output"]["value"]) == (
        all_of_them["denoise"]["value"],
        all_of_them["output"]["value"],
    )


def test_the_student_is_validated_without_a_trace(runs: Path, run: Path, tmp_path: Path) -> None:
    watch = [
        f"train.validation.{key}={value}"
        for key, value in (("every", 2), ("num_images", 24), ("num_inference_steps", 2))
    ]
    assert distill(runs, tmp_path / "watched", *watch)[0] == 0
    watched = log(tmp_path / "watched")
    assert [entry["step"] for entry in watched if entry.pop("validation", {}).get("fid", -1) >= 0] == [2, 4]
    assert watched == log(run)


def test_what_cannot_be_compared_is_one_line(runs: Path, tmp_path: Path) -> None:
    code, _, errors = distill(runs, tmp_path / "run", "losses.attention_mse.heads=equal")
    assert code == 2 and "distill.yaml: key losses.attention_mse" in errors and "heads: average" in errors
    assert not (tmp_path / "run").exists()
