"""Term balancing: what a weight means then, on real gradients, across a resume, and where it cannot be had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from commands import DISTILL_CONFIG, TEACHER_CONFIG, command, sets
from safetensors.torch import load_file
from torch import nn

from shd_diffusion.training.balance import Balanced, last_block

SHORT = ["train.max_steps=4", "train.batch_size=4", "train.log_every=1", "train.checkpoint_every=2"]
TEACHER = ["model.arguments.num_layers=2", "model.arguments.num_attention_heads=4"]
STUDENT = ["student.arguments.num_layers=2", "student.arguments.num_attention_heads=2"]


SCALES = {"denoise": 3.0, "variance": 7.0, "output": 0.5, "shd": 1e3}


class Sums:
    """Terms whose gradients on the last block are known: scale · mean over a batch of x · w."""

    def __call__(self, model: nn.Module, batch: Any, step: int) -> dict[str, torch.Tensor]:
        first, last = model.blocks
        terms = {name: scale * (last.weight @ batch).sum() for name, scale in SCALES.items()}
        return terms | {"elsewhere": (first.weight @ batch).sum()}

    def weights(self, step: int) -> dict[str, float]:
        return {"denoise": 2.0, "variance": 1.0, "output": 1.0, "shd": 0.25, "elsewhere": 5.0}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"mine": torch.ones(1)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert state.keys() == {"mine"}


def model() -> nn.Module:
    built = nn.Module()
    built.blocks = nn.ModuleList(nn.Linear(3, 2, bias=False) for _ in range(2))
    return built


def test_a_weight_is_a_multiple_of_the_denoising_gradient() -> None:
    torch.manual_seed(0)
    built = model()
    balanced = Balanced(Sums(), built, Accelerator(cpu=True))
    assert balanced.weights(0) == Sums().weights(0)  # nothing is known yet
    for step in range(3):
        terms = balanced(built, torch.randn(3), step)
    weights, plain = balanced.weights(3), Sums().weights(3)
    norms = {
        name: torch.autograd.grad(weights[name] * terms[name], last_block(built).weight, retain_graph=True)[
            0
        ].norm()
        for name in ("denoise", "output", "shd")
    }
    for name in ("output", "shd"):
        assert norms[name] / norms["denoise"] == pytest.approx(plain[name], rel=1e-5)
    assert all(weights[name] == plain[name] for name in ("denoise", "variance", "elsewhere"))


def test_its_memory_is_a_part_of_the_state_and_holds_no_infinities() -> None:
    built = model()
    first, second = (Balanced(Sums(), built, Accelerator(cpu=True)) for _ in range(2))
    for value in (1.0, float("nan"), 2.0):
        first(built, torch.full((3,), value), 0)
    second.load_state_dict(first.state_dict())
    assert second.weights(1) == first.weights(1) != Sums().weights(1)
    assert all(weight == weight and weight < 1e4 for weight in first.weights(1).values())


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("balance") / "teacher"
    assert command("train-teacher", TEACHER_CONFIG, "--output", run, *sets(*SHORT, *TEACHER))[0] == 0
    return run


def distill(teacher: Path, run: Path, *more: str) -> tuple[int, str]:
    arguments = sets(
        *SHORT, *STUDENT, f"teacher.path={teacher}", "losses.balance=true", "losses.shd.weight=5", *more
    )
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", run, *arguments)
    return code, errors


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_balanced_run_is_resumed_bit_by_bit(checkpointing: str, teacher: Path, tmp_path: Path) -> None:
    run, more = tmp_path / "run", f"train.gradient_checkpointing={checkpointing}"
    assert distill(teacher, run, more)[0] == 0

    def result() -> tuple[dict[str, torch.Tensor], list[dict]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        weights = load_file(run / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors")
        return weights, [line["terms"] for line in lines]

    weights, terms = result()
    shd = [line["shd"]["weighted"] / line["shd"]["value"] for line in terms]
    assert shd[0] == pytest.approx(5.0) and len({round(weight, 6) for weight in shd}) == 4
    for part in ("pipeline", "checkpoints/step-00000004"):
        shutil.rmtree(run / part)
    (run / "summary.json").unlink()
    assert distill(teacher, run, more)[0] == 0
    again, terms_again = result()
    assert all(torch.equal(again[name], weights[name]) for name in weights) and terms_again == terms


@pytest.mark.parametrize("other", ["train.shard=true", "train.compile=true", "losses.denoise.weight=0"])
def test_what_it_cannot_be_had_with_is_one_line(other: str, teacher: Path, tmp_path: Path) -> None:
    code, errors = distill(teacher, tmp_path / "run", other)
    assert code == 2 and "losses.balance" in errors and other.split("=")[0] in errors
    assert not (tmp_path / "run").exists()
