"""The table of results, once as data and then as Markdown and for the terminal (the page has its own)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from shd_diffusion.reporting.protocol import protocol_line, protocol_warning
from shd_diffusion.reporting.runs import Run, read_runs


def significant(value: float) -> str:
    """A number in three figures: 9.74, 0.00120, 1043."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"


def count(value: float) -> str:
    """A large number in three figures: 71.3 k, 675 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in three figures: 4.21 ms, 1.3 s."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


fid_text = "{:.2f}".format


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of a run.

    `best` says which end of it is good, None where there is no better; `spread` is the metric whose interval
    or standard deviation stands beside it; an `optional` column is left out where no run has the figure.
    """

    title: str
    short: str
    value: Callable[[Run], float | None]
    text: Callable[[float], str]
    best: Callable[..., float] | None = None
    spread: str | None = None
    optional: bool = False

    def cell(self, run: Run, target: float | None) -> Cell:
        """The figure of this run, marked if it is the `target`."""
        value = self.value(run)
        if value is None:
            return Cell("–")
        return Cell(self.text(value), self._spread(run), value == target)

    def _spread(self, run: Run) -> str | None:
        """The 95 % interval if there is one, otherwise the standard deviation."""
        if self.spread and run.metrics and (interval := run.metrics.intervals.get(self.spread)):
            return "[{}, {}]".format(*map(self.text, interval))
        deviation = run.figure(f"{self.spread}_std")
        return None if deviation is None else f"± {self.text(deviation)}"


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure as text, its interval or standard deviation if known, and whether it is the best."""

    text: str
    spread: str | None = None
    best: bool = False

    def __str__(self) -> str:
        return self.text + (f" {self.spread}" if self.spread else "")


@dataclass(frozen=True, slots=True)
class Row:
    run: Run
    cells: list[Cell]


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows; `note` is the protocol of the figures, `warning` says why they do not compare."""

    titles: list[str]
    short_titles: list[str]
    rows: list[Row]
    note: str
    warning: str | None

    @property
    def marks(self) -> bool:
        """Whether the best figures are marked."""
        return any(cell.best for row in self.rows for cell in row.cells)


def _metric(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.figure(name)


COLUMNS = [
    Column("Parameters", "Params", lambda run: run.summary["parameters"], count),
    Column("Heads", "Heads", lambda run: run.summary["heads"], "{:.0f}".format),
    Column("FID ↓", "FID ↓", _metric("fid"), fid_text, min, "fid"),
    Column("FID∞ ↓", "FID∞ ↓", _metric("fid_infinity"), fid_text, min, optional=True),
    Column("sFID ↓", "sFID ↓", _metric("sfid"), fid_text, min, "sfid", optional=True),
    Column("IS ↑", "IS ↑", _metric("inception_score_mean"), "{:.2f}".format, max, "inception_score"),
    Column("KID ↓", "KID ↓", _metric("kid_mean"), significant, min, "kid"),
    Column("Precision ↑", "Prec ↑", _metric("precision"), "{:.3f}".format, max),
    Column("Recall ↑", "Rec ↑", _metric("recall"), "{:.3f}".format, max),
    Column("Density ↑", "Dens ↑", _metric("density"), "{:.3f}".format, max, optional=True),
    Column("Coverage ↑", "Cov ↑", _metric("coverage"), "{:.3f}".format, max, optional=True),
    Column("Labels right ↑", "Right ↑", _metric("label_accuracy"), "{:.1%}".format, max, optional=True),
    Column("Time an image", "Time", lambda run: run.seconds_per_image, duration),
]


def build_table(runs: Sequence[Run]) -> Table:
    """The table of these runs. Of several students the best of each figure is marked, if they compare."""
    columns = [c for c in COLUMNS if not c.optional or any(c.value(run) is not None for run in runs)]
    students = [run for run in runs if not run.is_teacher]
    warning = protocol_warning(runs)
    best = {} if warning else {column.title: _best(column, students) for column in columns}
    fid = fid_title(runs)
    return Table(
        titles=[fid + " ↓" if column.title == "FID ↓" else column.title for column in columns],
        short_titles=[column.short for column in columns],
        rows=[
            Row(
                run,
                [column.cell(run, None if run.is_teacher else best.get(column.title)) for column in columns],
            )
            for run in runs
        ],
        note=protocol_line(runs) + _INTERVALS * any(run.metrics and run.metrics.intervals for run in runs),
        warning=warning,
    )


_INTERVALS = " Brackets hold the 95 % interval by bootstrap."


def _best(column: Column, runs: Sequence[Run]) -> float | None:
    """The best value where there is a choice."""
    values = [value for run in runs if (value := column.value(run)) is not None]
    return column.best(values) if column.best and len(values) > 1 else None


def fid_title(runs: Sequence[Run]) -> str:
    """FID, named for the features that it is computed on."""
    features = {run.metrics.features for run in runs if run.metrics}
    name = features.pop() if len(features) == 1 else None
    return f"FID ({name})" if name else "FID"


def markdown_table(paths: Sequence[Path]) -> str:
    """The table of these runs in GitHub's Markdown, the protocol below it.

    Raises:
        UserError: a folder is no finished run, or a file in it is damaged.
    """
    table = build_table(read_runs(paths))
    lines = [
        ["Run", *table.titles],
        ["---", *["---:"] * len(table.titles)],
        *([_escape(row.run.name), *map(_markdown_cell, row.cells)] for row in table.rows),
    ]
    notes = [table.note, *([f"**{_escape(table.warning)}**"] if table.warning else [])]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "\n\n".join(notes) + "\n"


def _markdown_cell(cell: Cell) -> str:
    return f"**{cell}**" if cell.best else str(cell)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def print_table(paths: Sequence[Path], console: Console | None = None) -> None:
    """Print the table of these runs to the terminal, in short: it fits 80 columns.

    Raises:
        UserError: a folder is no finished run, or a file in it is damaged.
    """
    table = build_table(read_runs(paths))
    rich = RichTable("Run", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for title in table.short_titles:
        rich.add_column(title, justify="right", no_wrap=True)
    for row in table.rows:
        cells = (Text(cell.text, "bold green" if cell.best else "") for cell in row.cells)
        rich.add_row(Text(row.run.name), *cells)
    console = console or Console()
    console.print(rich)
    console.print(Text(table.note, "dim"))
    if table.warning:
        console.print(Text(table.warning, "yellow"))
