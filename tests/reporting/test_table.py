"""The table of results: the numbers of metrics.json, the best marked only where figures compare."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from shd_diffusion.reporting import markdown_table, print_table
from shd_diffusion.reporting.table import count, duration, significant


def cells(markdown: str) -> dict[str, list[str]]:
    """Rows of a Markdown table by their first cell."""
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1  # every row has every column
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in rows}


def edit_metrics(run: Path, **changes: object) -> None:
    path = run / "evaluation" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_markdown_holds_the_figures_and_marks_the_best_student(runs: dict[str, Path]) -> None:
    table = markdown_table(list(runs.values()))
    rows = cells(table)
    columns = rows["Run"]
    assert columns[:3] == ["Parameters", "Heads", "FID (digits-classifier) ↓"]
    assert rows["kd-shd"] == [
        "261 k", "5", "**104.30**", "**7.96 ± 0.11**", "**2.61 ± 0.200**", "**0.796**", "**0.734**",
        "**85.4%**", "4.35 ms",
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
    assert table.rstrip().splitlines()[-1].startswith("Protocol: seed 0; num inference steps 25; ")


def test_figures_of_other_protocols_are_not_ranked(
    runs: dict[str, Path], fresh_run: Callable[[str], Path]
) -> None:
    other = fresh_run("none")
    protocol = json.loads((other / "evaluation/metrics.json").read_text())["protocol"]
    edit_metrics(other, protocol=protocol | {"num_inference_steps": 10})
    table = markdown_table([runs["kd"], runs["kd-shd"], other])
    assert "do not compare: the protocols differ in num\\_inference\\_steps." in table
    assert not any("**" in cell for row in cells(table).values() for cell in row)
    edit_metrics(other, protocol=protocol | {"resize": "none"})  # the others do not say
    assert "the protocols differ in resize." in markdown_table([runs["kd"], other])
    edit_metrics(other, protocol=protocol | {"steps_trained": 10})  # of the model, not of the measurement
    assert "do not compare" not in markdown_table([runs["kd"], other])


def test_a_missing_figure_is_a_dash_and_never_the_best(
    runs: dict[str, Path], fresh_run: Callable[[str], Path]
) -> None:
    other = fresh_run("none")
    edit_metrics(other, fid=float("nan"), precision=None, label_accuracy=None)
    rows = cells(markdown_table([runs["kd"], other]))
    fid, precision = (rows["Run"].index(title) for title in ("FID (digits-classifier) ↓", "Precision ↑"))
    assert rows["none"][fid] == rows["none"][precision] == "–"
    assert "**" not in rows["kd"][fid]  # nothing to choose from
    assert rows["none"][-2] == "–" and rows["Run"][-2] == "Labels right ↑"
    edit_metrics(fresh := fresh_run("kd"), label_accuracy=None)
    assert "Labels right ↑" not in cells(markdown_table([fresh, other]))["Run"]


def test_intervals_stand_beside_their_figures(fresh_run: Callable[[str], Path]) -> None:
    run = fresh_run("kd")
    edit_metrics(run, fid_interval=[370.1, 402.46], fid_infinity=380.04)
    table = markdown_table([run])
    rows = cells(table)
    assert rows["kd"][2] == "389.70 [370.10, 402.46]"
    assert rows["kd"][rows["Run"].index("FID∞ ↓")] == "380.04"
    assert table.rstrip().endswith("Brackets hold the 95 % interval by bootstrap.")


def test_markdown_escapes_names(fresh_run: Callable[[str], Path]) -> None:
    assert r"| a\|b\_c |" in markdown_table([fresh_run("a|b_c")])


def test_the_terminal_table_fits_80_columns(runs: dict[str, Path]) -> None:
    console = Console(file=io.StringIO(), width=80)
    print_table(list(runs.values()), console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, printed.splitlines())) <= 80
    assert re.search(r"kd-shd +261 k +5 +104\.30 +7\.96 +2\.61 +0\.796 +0\.734 +85\.4% +4\.35 ms", printed)
    assert "features digits-classifier" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count(812), "812"), (count(71_304), "71.3 k"), (count(675e6), "675 M"), (count(12e9), "12 G"),
        (duration(0.00421), "4.21 ms"), (duration(1.3), "1.3 s"), (duration(0.012), "12 ms"),
        (significant(0.0012), "0.00120"), (significant(110.2), "110"), (significant(-10432.2), "-10432"),
    ],
)  # fmt: skip
def test_numbers_are_short(text: str, expected: str) -> None:
    assert text == expected
