"""What runs cost, as a report tells it: shares of the teacher's, and only where they were measured together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shd_diffusion.errors import UserError
from shd_diffusion.reporting.cost import cost_lines, cost_note
from shd_diffusion.reporting.metrics_table import metrics_table
from shd_diffusion.reporting.page import commands, missing
from shd_diffusion.reporting.runs import read_runs


def edit_benchmark(run: Path, **changes: Any) -> None:
    path = run / "evaluation" / "benchmark.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def costs_of(*paths: Path) -> dict[str, list[str]]:
    """The cells of parameters and of what was measured, titles first."""
    table = metrics_table(read_runs(paths))
    measured = [i for i, title in enumerate(table.titles) if title.startswith(("Param", "Multiply", "Time"))]
    rows = {run.name: [str(cells[i]) for i in measured] for run, cells in table.rows}
    return {"": [table.titles[i] for i in measured]} | rows


def test_students_are_told_as_shares_of_their_teacher(runs: dict[str, Path]) -> None:
    found = costs_of(runs["teacher"], runs["kd"])
    assert found[""] == ["Parameters", "Multiply-adds an image", "Time an image"]
    assert found["teacher"] == ["1.24 M", "275 M", "200 ms"]
    assert found["kd"] == ["261 k (0.21x)", "68.8 M (0.25x)", "50 ms (0.25x)"]
    assert costs_of(runs["none"], runs["kd"])["kd"] == ["261 k", "68.8 M", "50 ms"]  # of whose?
    assert cost_note(read_runs([runs["teacher"], runs["kd"]])) == (
        "Multiply-adds and times by benchmark: float32, on cpu, 2 threads, 25 steps, batch 1, medians of 5 rounds in "
        "turns."
    )


def test_times_of_two_benchmarks_are_no_shares(
    runs: dict[str, Path], fresh_run: Callable[[str], Path]
) -> None:
    other = fresh_run("kd")
    edit_benchmark(other, environment={"started": "2026-01-02T00:00:00+00:00"})
    found = costs_of(runs["teacher"], other)
    assert found["kd"] == ["261 k (0.21x)", "68.8 M", "50 ms"]
    assert "different calls of benchmark" in str(cost_note(read_runs([runs["teacher"], other])))


def test_without_sampled_images_a_call_is_told(fresh_run: Callable[[str], Path]) -> None:
    pair = [fresh_run("teacher"), fresh_run("kd")]
    for run in pair:
        timings = json.loads((run / "evaluation" / "benchmark.json").read_text())["timings"]
        calls = [timing for timing in timings if timing["what"] == "call"]
        edit_benchmark(run, macs_image=None, calls_per_image=None, timings=calls)
    found = costs_of(*pair)
    assert found[""][1:] == ["Multiply-adds a call", "Time a call"]
    assert found["kd"][1:] == ["2.75 M (0.25x)", "2 ms (0.25x)"]
    head, _, line = cost_lines(read_runs(pair))
    assert head[3:] == ["Call, batch 1", "Call, batch 4", "Images a second, batch 4", "Memory, batch 4"]
    assert line == [
        "kd", "2.75 M", "–", "2 ms [1.8 ms, 2.2 ms]", "4 ms [3.6 ms, 4.4 ms]", "–", "4 MB",
    ]  # fmt: skip


def test_without_a_benchmark_the_time_that_sampling_took_stands_alone(
    fresh_run: Callable[[str], Path],
) -> None:
    pair = [fresh_run("teacher"), fresh_run("kd")]
    for run in pair:
        (run / "evaluation" / "benchmark.json").unlink()
    runs = read_runs(pair)
    assert costs_of(*pair)["kd"] == ["261 k (0.21x)", "4.64 ms"]
    assert cost_note(runs) is None and cost_lines(runs) == []
    assert missing(runs)["benchmark"] == [f"shd-diffusion benchmark {pair[0]} {pair[1]}"]
    assert not any("shd-diffusion benchmark" in command for command in commands(runs))


def test_a_damaged_benchmark_is_named(fresh_run: Callable[[str], Path]) -> None:
    run = fresh_run("kd")
    edit_benchmark(run, timings=[])
    with pytest.raises(
        UserError, match=r"benchmark\.json: key `timings`: .*; delete it and run the command that wrote it"
    ):
        read_runs([run])
