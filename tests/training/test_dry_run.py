"""What `--dry-run` tells, against sizes and counts worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import DISTILL_CONFIG, ROOT, TEACHER_CONFIG, command, sets
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from shd_diffusion.operations import Meter

SMALL = ["train.batch_size=4", f"teacher.path={TEACHER_CONFIG}"]


def test_operations_of_attention_are_those_of_its_products() -> None:
    query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    with Meter() as meter:
        output = scaled_dot_product_attention(query, key, value)
    product = 2 * (2 * 3) * 5 * 7 * 8
    assert meter.operations == 2 * product  # Q Kᵀ, P V
    with Meter() as meter:
        output.sum().backward()
    assert meter.operations == 5 * product  # Q Kᵀ again, dP, dV, dQ, dK


def test_operations_of_a_linear_layer() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(10, 6)
    with Meter() as meter:
        layer(x).sum().backward()
    assert meter.operations == 2 * (2 * 10 * 6 * 4)  # forward and the weight's gradient


def test_operations_are_those_that_torch_counts() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.Conv2d(3, 2, 1)), torch.randn(2, 2, 5, 5)
    with FlopCounterMode(display=False) as reference:
        model(x).sum().backward()
    with Meter() as meter:
        model(x).sum().backward()
    assert meter.operations == reference.get_total_flops() > 0


def test_memory_is_what_is_held_at_one_time() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(10, 6)
    with Meter([*layer.parameters(), x]) as meter:
        hidden = layer(x)
        raised = hidden.exp()
        del hidden
        view = raised.view(-1)
        assert meter.live == 4 * (10 * 4) and meter.peak == 4 * (2 * 10 * 4) and len(view) == 40
        x.add_(1)
    assert meter.peak == 4 * (2 * 10 * 4) and meter.largest == 4 * (10 * 4)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("dry")
    code, output, errors = command(
        "distill", DISTILL_CONFIG, "--dry-run", "--output", folder / "run", *sets(*SMALL)
    )
    assert code == 0, errors
    assert "is a config: a teacher of its sizes" in errors and "12→6→5" in errors
    assert list(folder.iterdir()) == []
    return json.loads(output)


@pytest.mark.parametrize("compares", ["losses.contrastive.weight=1", "train.mix=cutmix_pick"])
def test_what_compares_the_images_of_a_batch_is_counted(compares: str, tmp_path: Path) -> None:
    arguments = "distill", DISTILL_CONFIG, "--dry-run", "--output", tmp_path / "run"
    code, _, errors = command(*arguments, *sets(*SMALL, compares))
    assert code == 0, errors
    code, _, errors = command(*arguments, *sets(*SMALL, compares, "train.micro_batch_size=1"))
    assert code == 2 and "raise `batch_size` or `micro_batch_size`" in errors


def test_models_and_plan(figures: dict) -> None:
    assert (figures["teacher"]["parameters"], figures["student"]["parameters"]) == (1_233_700, 254_204)
    assert [pair["heads"] for pair in figures["merge_plan"]] == [[12, 6, 5]] * 6
    assert figures["merge_plan"][0]["merged"] == [[0, 1, 2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]


def test_memory_is_four_copies_of_the_student_and_more(figures: dict) -> None:
    memory, weights = figures["memory_bytes"], 4 * 254_204
    assert figures["images_per_pass"] == 4
    assert memory["teacher"] == 4 * 1_233_700
    assert (memory["weights"], memory["gradients"], memory["average"]) == (weights, weights, weights)
    assert memory["optimiser"] == 2 * weights
    assert (
        memory["activations"] > 4 * 6 * 16 * 5 * 8 * 4
    )  # queries of 6 blocks, 16 tokens and 5 heads of 8, and more
    assert memory["sum"] == sum(value for name, value in memory.items() if name != "sum")


def test_operations_are_a_teacher_forward_and_three_of_the_student(figures: dict) -> None:
    """Forward once, backward twice that; SHD and the gradient that no input needs make the difference."""
    count = figures["operations_per_image"]
    alone = count["teacher_forward"] + 3 * count["forward"]
    assert 0.95 * alone < count["training"] < 1.3 * alone
    run = figures["run"]
    assert run["images"] == 600 * 4 and run["operations"] == 600 * 4 * count["training"]
    assert figures["measured"]["images"] <= 4 and set(figures["measured"]["terms"]) == {
        "denoise",
        "output",
        "shd",
    }


def test_a_teacher_alone_with_masking(tmp_path: Path) -> None:
    config = ROOT / "configs" / "digits" / "mdtv2-teacher.yaml"
    code, output, errors = command(
        "train-teacher", config, "--dry-run", "--output", tmp_path / "run", *sets("train.batch_size=2")
    )
    assert code == 0, errors
    figures = json.loads(output)
    assert "teacher" not in figures and figures["merge_plan"] == []
    assert set(figures["measured"]["terms"]) == {"denoise", "denoise_masked"}
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_is_not_there(tmp_path: Path) -> None:
    code, _, errors = command(
        "distill", DISTILL_CONFIG, "--dry-run", *sets(f"teacher.path={tmp_path / 'none'}")
    )
    assert code == 2 and "set `teacher.config` to a folder with them" in errors


def test_a_student_that_starts_from_its_teacher_says_how_much_it_takes() -> None:
    pruned = [
        "student.init=teacher",
        "student.arguments.num_attention_heads=12",
        "student.arguments.num_layers=2",
    ]
    code, output, errors = command(
        "distill", DISTILL_CONFIG, "--dry-run", *sets(*SMALL, *pruned, "train.batch_size=1")
    )
    assert code == 0, errors
    parameters = json.loads(output)["student"]["parameters"]
    assert f"{parameters:,} of {parameters:,} parameters, come from the teacher" in errors


def test_a_start_that_is_no_start() -> None:
    arguments = ("distill", DISTILL_CONFIG, "--dry-run")
    code, _, errors = command(*arguments, *sets(*SMALL, "student.init=teacher", "student.pretrained=x"))
    assert code == 2 and "`pretrained` gives class and arguments too" in errors
    code, _, errors = command(*arguments, *sets(*SMALL, "student.init=best"))
    assert code == 2 and "student.init" in errors
