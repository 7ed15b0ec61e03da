"""The table of results: the numbers of metrics.json, the best marked only where metrics compare."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from shd_diffusion.reporting import print_table
from shd_diffusion.reporting.metrics_table import MetricsTable, against_teacher_table, metrics_table
from shd_diffusion.reporting.page import run_styles
from shd_diffusion.reporting.quality_plots import per_class_fid
from shd_diffusion.reporting.runs import read_runs
from shd_diffusion.reporting.tables import count, csv_text, duration, escape_markdown, markdown, significant

from .made_up_text_runs import make_text_run


def table_of(*runs: Path) -> MetricsTable:
    return metrics_table(read_runs(runs))


def cells(table: MetricsTable) -> dict[str, list[str]]:
    """Rows by the name of their run, titles first; the best ones have two asterisks."""
    rows = {run.name: [f"**{cell}**" if cell.best else str(cell) for cell in row] for run, row in table.rows}
    assert all(len(row) == len(table.titles) for row in rows.values())
    return {"Run": table.titles} | rows


def edit_metrics(run: Path, **changes: object) -> None:
    path = run / "evaluation" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_table_holds_the_metrics_and_marks_the_best_student(runs: dict[str, Path]) -> None:
    table = table_of(*runs.values())
    rows = cells(table)
    columns = rows["Run"]
    assert columns[:3] == ["Parameters", "Heads", "FID (digits-classifier) ↓"]
    assert rows["kd-shd"] == [
        "261 k (0.21x)", "5", "**104.30**", "**7.96 ± 0.11**", "**2.61 ± 0.200**", "**0.796**", "**0.734**",
        "**85.4%**", "68.8 M (0.25x)", "50 ms (0.25x)", "60 s",
    ]  # fmt: skip
    for name, run in runs.items():
        written = json.loads((run / "evaluation" / "metrics.json").read_text())
        for column, key in (
            ("FID (digits-classifier) ↓", "fid"),
            ("Precision ↑", "precision"),
            ("Recall ↑", "recall"),
        ):
            assert float(rows[name][columns.index(column)].strip("*")) == pytest.approx(
                written[key], abs=0.006
            )
    assert not any("**" in cell for name in ("teacher", "none", "kd") for cell in rows[name])
    assert table.note.startswith("Protocol: seed 0; num inference steps 25; ")


def test_metrics_of_other_protocols_are_not_ranked(
    runs: dict[str, Path], fresh_run: Callable[[str], Path]
) -> None:
    other = fresh_run("none")
    protocol = json.loads((other / "evaluation/metrics.json").read_text())["protocol"]
    edit_metrics(other, protocol=protocol | {"num_images": 10})
    table = table_of(runs["kd"], runs["kd-shd"], other)
    assert table.warning == "These metrics do not compare: the protocols differ in num_images."
    assert not any("**" in cell for row in cells(table).values() for cell in row)
    edit_metrics(other, protocol=protocol | {"resize": "none"})  # the others do not say
    assert "the protocols differ in resize." in str(table_of(runs["kd"], other).warning)
    edit_metrics(other, protocol=protocol | {"ema_decay": 0.5})  # of the model, not of the measurement
    assert table_of(runs["kd"], other).warning is None


def test_a_missing_metric_is_a_dash_and_never_the_best(
    runs: dict[str, Path], fresh_run: Callable[[str], Path]
) -> None:
    other = fresh_run("none")
    edit_metrics(other, fid=float("nan"), precision=None, label_accuracy=None)
    rows = cells(table_of(runs["kd"], other))
    fid, precision = (rows["Run"].index(title) for title in ("FID (digits-classifier) ↓", "Precision ↑"))
    assert rows["none"][fid] == rows["none"][precision] == "–"
    assert "**" not in rows["kd"][fid]  # nothing to choose from
    assert rows["none"][-4] == "–" and rows["Run"][-4] == "Class accuracy ↑"
    edit_metrics(fresh := fresh_run("kd"), label_accuracy=None)
    assert "Class accuracy ↑" not in cells(table_of(fresh, other))["Run"]


@pytest.mark.parametrize(
    ("features", "title"),
    [
        ("inception-v3-compat", "FID (inception-v3-compat) ↓"),
        ("dinov2-vit-l-14", "FD (DINOv2 vit-l-14) ↓"),
        ("efficientnet-lite0", "FD (EfficientNet-Lite0) ↓"),
        ("of another version", "FID (of another version) ↓"),
    ],
)
def test_a_frechet_distance_is_named_for_its_features(
    features: str, title: str, fresh_run: Callable[[str], Path]
) -> None:
    run = fresh_run("kd")
    protocol = json.loads((run / "evaluation/metrics.json").read_text())["protocol"]
    edit_metrics(run, protocol=protocol | {"features": features}, fid_infinity=380.04)
    table, (kind, rest) = table_of(run), title.split(" ", 1)
    assert table.titles[2:4] == [title, f"{kind}∞ {rest}"]
    assert table.short_titles[2:4] == [f"{kind} ↓", f"{kind}∞ ↓"]
    (plot,) = per_class_fid(read_runs([run]), run_styles(read_runs([run])))
    assert f"{title.removesuffix(' ↓')} of the class" in plot.svg


def test_a_metric_has_a_column_where_a_run_has_it(fresh_run: Callable[[str], Path]) -> None:
    run = fresh_run("kd")
    assert "FID∞ (digits-classifier) ↓" not in cells(table_of(run))["Run"]
    edit_metrics(run, fid_infinity=380.04, cmmd=0.25, kid_mean=None)
    rows = cells(table_of(run))
    titles = ("FID∞ (digits-classifier) ↓", "CMMD ↓")
    assert [rows["kd"][rows["Run"].index(title)] for title in titles] == ["380.04", "0.250"]
    assert "KID ↓" not in rows["Run"]


def test_markdown_takes_text_as_text() -> None:
    assert markdown([["a|b", "n"], ["_c_", "d_e"]]) == "| a\\|b | n |\n| --- | --- |\n| \\_c\\_ | d_e |\n"
    assert escape_markdown("# <b> [x](y) $z$\n* `") == "\\# &lt;b> \\[x\\](y) \\$z\\$\\\\n\\* \\`"


def test_csv_has_a_column_for_every_key() -> None:
    assert csv_text([{"a": 1}, {"b": "x,y"}]) == 'a,b\n1,\n,"x,y"\n'
    assert csv_text([]) == "\n"


def test_the_terminal_table_fits_80_columns(runs: dict[str, Path]) -> None:
    console = Console(file=io.StringIO(), width=80)
    print_table(list(runs.values()), console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, printed.splitlines())) <= 80
    assert re.search(r"kd-shd +261 k +5 +104\.30 +7\.96 +2\.61 +0\.796 +0\.734 +85\.4% +50 ms", printed)
    assert "features digits-classifier" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(812), "812"), (count(71_304), "71.3 k"), (count(675e6), "675 M"), (count(12e9), "12 G"),
        (duration(0.00421), "4.21 ms"), (duration(1.3), "1.3 s"), (duration(0.012), "12 ms"),
        (significant(0.0012), "0.00120"), (significant(110.2), "110"), (significant(-10432.2), "-10432"),
        (count(999_700), "1 M"), (duration(0.9997), "1 s"), (duration(1210), "1210 s"), (significant(999.7), "1000"),
    ],
)  # fmt: skip
def test_numbers_are_short(text: str, expected: str) -> None:
    assert text == expected


def against(*runs: Path) -> MetricsTable:
    table = against_teacher_table(read_runs(runs))
    assert table is not None
    return table


def test_students_stand_against_their_teacher(text_runs: list[Path]) -> None:
    table = against(*text_runs)
    assert cells(table) == {
        "Run": ["Latents, squared error ↓", "Latents, relative error ↓", "Features, cosine ↑"],
        "kd": ["0.150 [0.135, 0.165]", "30.0% [27.0%, 33.0%]", "0.700 [0.630, 0.770]"],
        "kd-shd": ["**0.0500 [0.0450, 0.0550]**", "**10.0% [9.0%, 11.0%]**", "**0.900 [0.810, 0.990]**"],
    }  # fmt: skip
    assert against_teacher_table(read_runs(text_runs[2:])) is None  # of a teacher


def test_the_terminal_tells_them_too(text_runs: list[Path]) -> None:
    console = Console(file=io.StringIO(), width=80)
    print_table(text_runs, console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"Against the teacher +MSE ↓ +rel\. ↓ +cos ↑", printed)
    assert re.search(r"kd-shd +0\.0500 +10\.0% +0\.900", printed)


def test_students_of_other_teachers_are_not_ranked(text_runs: list[Path], tmp_path: Path) -> None:
    other = make_text_run(tmp_path / "other", 0.2, images=1)
    found = json.loads((other / "evaluation" / "metrics.json").read_text())["against_teacher"]
    found["protocol"]["teacher_sha256"] = "cd" * 32
    found["lpips"] = {"mean": 0.25, "low": None, "high": None, "n": 1}
    edit_metrics(other, against_teacher=found)
    table = against(text_runs[0], other)
    assert (
        table.warning == "These metrics do not compare: the protocols differ in teacher_sha256."
        and not table.marks
    )
    assert [cells(table)[name][-1] for name in ("kd", "other")] == ["–", "0.250"]
