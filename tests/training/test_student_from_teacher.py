"""A pruned student through the command line: fewer blocks, as many heads, the teacher's weights."""

from __future__ import annotations

from pathlib import Path

import torch
from commands import DISTILL_CONFIG, TEACHER_CONFIG, command, sets
from safetensors.torch import load_file

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
