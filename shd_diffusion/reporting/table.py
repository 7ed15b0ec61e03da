"""The table of results, once as data and then as Markdown and for the terminal (the page has its own)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from shd_diffusion.reporting.protocol import differing_protocol, protocol_line
from shd_diffusion.reporting.runs import Run, read_runs


def count(value: float) -> str:
    """A large number in three figures: 71.3 k, 675 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in three figures: 4.21 ms, 1.3 s."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a run.

    `best` says which end of it is good, None where there is no better; `spread` names the metric that is its
    standard deviation; an `optional` column is left out where no run has the figure.
    """

    title: str
    value: Callable[[Run], float | None]
    text: Callable[[float], str]
    best: Callable[..., float] | None = None
    spread: str | None = None
    optional: bool = False

    def cell(self, run: Run) -> str:
        value = self.value(run)
        if value is None or not math.isfinite(value):
            return "–"
        spread = run.figure(self.spread) if self.spread else None
        return self.text(value) + (f" ± {self.text(spread)}" if spread is not None else "")


@dataclass(frozen=True, slots=True)
class Row:
    run: Run
    cells: list[str]
    best: list[bool]


@dataclass(frozen=True, slots=True)
class Table:
    """Titles and rows; `note` says what the figures are computed on, `warning` why they may not compare."""

    titles: list[str]
    rows: list[Row]
    note: str
    warning: str | None


def _metric(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.figure(name)


COLUMNS = [
    Column("Parameters", lambda run: run.summary["parameters"], count),
    Column("Heads", lambda run: run.summary["heads"], "{:.0f}".format),
    Column("FID ↓", _metric("fid"), "{:.2f}".format, min),
    Column("sFID ↓", _metric("sfid"), "{:.2f}".format, min, optional=True),
    Column("IS ↑", _metric("inception_score_mean"), "{:.2f}".format, max, "inception_score_std"),
    Column("KID ↓", _metric("kid_mean"), "{:.4g}".format, min, "kid_std"),
    Column("Precision ↑", _metric("precision"), "{:.3f}".format, max),
    Column("Recall ↑", _metric("recall"), "{:.3f}".format, max),
    Column("Labels right ↑", _metric("label_accuracy"), "{:.1%}".format, max, optional=True),
    Column("Time an image", lambda run: run.seconds_per_image, duration),
]


def build_table(runs: Sequence[Run]) -> Table:
    """The table of these runs. Of several students the best of each quality figure is marked, if they compare."""
    differing = differing_protocol(runs)
    rivals = [] if differing else [run for run in runs if not run.is_teacher]
    columns = [c for c in COLUMNS if not c.optional or any(c.value(run) is not None for run in runs)]
    best = [_best(column, rivals) for column in columns]
    rows = [
        Row(
            run,
            [column.cell(run) for column in columns],
            [
                run in rivals and target is not None and column.value(run) == target
                for column, target in zip(columns, best, strict=True)
            ],
        )
        for run in runs
    ]
    warning = f"These figures do not compare: the protocols differ in {', '.join(differing)}."
    titles = [column.title.replace("FID ↓", f"{fid_title(runs)} ↓") if column.title == "FID ↓" else column.title for column in columns]
    return Table(titles, rows, protocol_line(runs), warning if differing else None)


def fid_title(runs: Sequence[Run]) -> str:
    """FID, named for the features that it is computed on."""
    features = {run.metrics.features for run in runs if run.metrics}
    name = features.pop() if len(features) == 1 else None
    return f"FID ({name})" if name else "FID"


def _best(column: Column, rivals: Sequence[Run]) -> float | None:
    """The best value where there is a choice."""
    values = [value for run in rivals if (value := column.value(run)) is not None and math.isfinite(value)]
    return column.best(values) if column.best and len(values) > 1 else None


def markdown_table(paths: Sequence[Path]) -> str:
    """The table of these runs in GitHub's Markdown, the protocol below it.

    Raises:
        UserError: a folder is no finished run, or a file in it is damaged.
    """
    table = build_table(read_runs(paths))
    lines = [
        ["Run", *table.titles],
        ["---", *["---:"] * len(table.titles)],
        *(
            [_escape(row.run.name), *(f"**{c}**" if b else c for c, b in zip(row.cells, row.best, strict=True))]
            for row in table.rows
        ),
    ]
    notes = [table.note, *([f"**{_escape(table.warning)}**"] if table.warning else [])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "\n\n".join(notes) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def print_table(paths: Sequence[Path], console: Console | None = None) -> None:
    """Print the table of these runs to the terminal.

    Raises:
        UserError: a folder is no finished run, or a file in it is damaged.
    """
    table = build_table(read_runs(paths))
    rich = RichTable("Run", caption=table.note, caption_justify="left")
    for title in table.titles:
        rich.add_column(title, justify="right")
    for row in table.rows:
        cells = (f"[bold green]{c}[/]" if b else c for c, b in zip(row.cells, row.best, strict=True))
        rich.add_row(row.run.name, *cells)
    console = console or Console()
    console.print(rich)
    if table.warning:
        console.print(table.warning, style="yellow")
