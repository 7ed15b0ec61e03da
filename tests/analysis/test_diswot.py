"""DisWOT's score: its two distances number by number, and what `inspect` tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command
from small_models import small_dit

from shd_diffusion.analysis.diswot import diswot_score, relation_distance, semantic_distance
from shd_diffusion.training.inspect_models import inspect_model, pair_rows


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.sqrt(sum(number**2 for number in row))


def test_the_distances_are_those_of_the_formulas() -> None:
    draw = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, heads, 3, 4, dtype=torch.float64, generator=draw).softmax(-1) for heads in (5, 2)]
    expected = 0.0
    for sample in range(2):
        for row in range(3):
            means = [
                unit(sum(of[sample, h, row].numpy() for h in range(of.shape[1])) / of.shape[1]) for of in maps
            ]
            expected += sum((means[0] - means[1]) ** 2) / 6
    assert semantic_distance(*maps).item() == pytest.approx(expected, rel=1e-12)
    features = [torch.randn(4, *shape, dtype=torch.float64, generator=draw) for shape in ((3, 2), (5,))]
    relations = []
    for of in features:
        flat = of.flatten(1).numpy()
        relations.append([unit(np.array([sum(a * b) for b in flat])) for a in flat])
    error = sum(((relations[0][i] - relations[1][i]) ** 2).sum() for i in range(4)) / 16
    assert relation_distance(*features).item() == pytest.approx(error, rel=1e-12)


def test_inspect_tells_the_score_of_a_student_which_is_best_for_the_teacher_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, student = small_dit(4), small_dit(2)
    rows = inspect_model(teacher)
    pairs = pair_rows(rows, rows)
    assert diswot_score(teacher, teacher, pairs, (1, 8, 8)) == 0
    score = diswot_score(teacher, student, pairs, (1, 8, 8))
    assert score < -1e-6
    for model, name in ((teacher, "teacher"), (student, "student")):
        model.save_pretrained(tmp_path / name)
    code, out, _ = command("inspect", tmp_path / "teacher", "--student", tmp_path / "student")
    assert code == 0 and f"students of this teacher: {score:.5f}" in out
