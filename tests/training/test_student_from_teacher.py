"""A pruned student through the command line: fewer blocks, as many heads, the teacher's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import DISTILL_CONFIG, TEACHER_CONFIG, command, sets
from safetensors.torch import load_file

from shd_diffusion.squeezing.plan import members, plans_from_json
from shd_diffusion.training import run as run_module

SHORT = ["train.max_steps=1", "train.batch_size=16", "train.log_every=1"]
PRUNED = [
    "student.init=teacher",
    "student.arguments.num_attention_heads=12",
    "student.arguments.num_layers=3",
]


def test_it_starts_where_the_teacher_is(tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    assert command("train-teacher", TEACHER_CONFIG, "--output", teacher, *sets(*SHORT))[0] == 0
    overrides = sets(*SHORT, *PRUNED, f"teacher.path={teacher}", "train.learning_rate=1e-9")
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", student, *overrides)
    assert code == 0 and "parameters, come from the teacher" in errors
    theirs, ours = (
        load_file(run / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors")
        for run in (teacher, student)
    )
    for block, by in ((0, 1), (1, 3), (2, 5)):
        name = "transformer_blocks.{}.attn1.to_q.weight"
        torch.testing.assert_close(ours[name.format(block)], theirs[name.format(by)], rtol=0, atol=1e-6)

    maps = load_file(student / "attention.safetensors")
    for block in range(3):  # as many heads: nothing is merged
        name = f"transformer_blocks.{block}.attn1"
        assert torch.equal(maps[f"{name}/squeezed"], maps[f"{name}/teacher"])


def test_a_narrow_student_is_squeezed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    small = sets(*SHORT, "model.arguments.num_layers=2", "model.arguments.num_attention_heads=4")
    assert command("train-teacher", TEACHER_CONFIG, "--output", teacher, *small)[0] == 0
    narrow = [
        "student.init=squeeze",
        "student.init_images=32",
        "student.arguments.num_layers=1",
        "student.arguments.num_attention_heads=2",
    ]
    overrides = sets(*SHORT, *narrow, f"teacher.path={teacher}", "train.learning_rate=1e-9")
    for output, passes in ((run, []), (tmp_path / "again", sets("train.micro_batch_size=3"))):
        code, _, errors = command("distill", DISTILL_CONFIG, "--output", output, *overrides, *passes)
        assert code == 0 and "squeezes the teacher on 32 images" in errors
        assert "its prediction differs from the teacher's by" in errors
    first, again = (
        load_file(output / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors")
        for output in (run, tmp_path / "again")
    )
    for name in first:  # the sums over passes round otherwise, and the ridge of 1e-5 lets that grow
        torch.testing.assert_close(first[name], again[name], rtol=1e-3, atol=1e-3)
    (plan,) = plans_from_json((run / "merge_plans.json").read_text()).values()
    assert len(members(plan.plan, 4)) == 2 and plan.teacher == "transformer_blocks.1.attn1"

    monkeypatch.setattr(run_module, "squeeze_student", None)  # from a checkpoint on it is not called
    more = [*overrides, *sets("train.max_steps=2")]
    assert command("distill", DISTILL_CONFIG, "--output", run, *more)[0] == 0


def test_images_are_given_to_what_is_fitted_alone() -> None:
    code, _, errors = command("distill", DISTILL_CONFIG, *sets("student.init_images=32"))
    assert code == 2 and "key `student`: `init_images` is what `init: squeeze` is fitted on" in errors


def test_a_student_that_cannot_be_squeezed_writes_nothing(tmp_path: Path) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    small = sets(*SHORT, "model.arguments.num_layers=1", "model.arguments.num_attention_heads=2")
    assert command("train-teacher", TEACHER_CONFIG, "--output", teacher, *small)[0] == 0
    wider = [
        "student.init=squeeze",
        "student.arguments.num_layers=1",
        "student.arguments.num_attention_heads=2",
    ]
    overrides = sets(*SHORT, *wider, "student.arguments.attention_head_dim=16", f"teacher.path={teacher}")
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", run, *overrides)
    assert (
        code == 2
        and "key `student.init`:" in errors
        and "give it at most those" in errors
        and not run.exists()
    )
