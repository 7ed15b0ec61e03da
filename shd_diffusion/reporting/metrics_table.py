"""The table of results: a line a run, a column a metric, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from shd_diffusion.reporting.runs import Run, read_runs
from shd_diffusion.reporting.tables import count, duration, significant, terminal
from shd_diffusion.settings_table import protocol_line, protocol_warning

fid_text = "{:.2f}".format


@dataclass(frozen=True, slots=True)
class Cell:
    """A metric as text, its interval or standard deviation if known, and whether it is the best."""

    text: str
    spread: str | None = None
    best: bool = False

    def __str__(self) -> str:
        return self.text + (f" {self.spread}" if self.spread else "")


@dataclass(frozen=True, slots=True)
class Column:
    """One number of a run.

    `best` says which end of it is good, None where there is no better; `spread` is the metric whose interval
    or standard deviation stands beside it; an `optional` column is left out where no run has the number.
    """

    title: str
    short: str
    value: Callable[[Run], float | None]
    text: Callable[[float], str]
    best: Callable[..., float] | None = None
    spread: str | None = None
    optional: bool = False

    def cell(self, run: Run, best: float | None) -> Cell:
        """The number of this run, marked if it is the `best`."""
        value = self.value(run)
        return Cell("–") if value is None else Cell(self.text(value), self._spread(run), value == best)

    def _spread(self, run: Run) -> str | None:
        """The 95 % interval if there is one, otherwise the standard deviation."""
        if self.spread and run.metrics and (interval := run.metrics.intervals.get(self.spread)):
            return "[{}, {}]".format(*map(self.text, interval))
        deviation = run.metric(f"{self.spread}_std")
        return None if deviation is None else f"± {self.text(deviation)}"

    def best_of(self, runs: Sequence[Run]) -> float | None:
        """The best value where there is a choice."""
        values = [value for run in runs if (value := self.value(run)) is not None]
        return self.best(values) if self.best and len(values) > 1 else None


@dataclass(frozen=True, slots=True)
class MetricsTable:
    """A row of cells a run; `note` is the protocol of the metrics, `warning` says why they do not compare."""

    titles: list[str]
    short_titles: list[str]
    rows: list[tuple[Run, list[Cell]]]
    note: str
    warning: str | None

    @property
    def marks(self) -> bool:
        """Whether the best metrics are marked."""
        return any(cell.best for _, cells in self.rows for cell in cells)


def _metric(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.metric(name)


COLUMNS = [
    Column("Parameters", "Params", lambda run: run.summary.parameters, count),
    Column("Heads", "Heads", lambda run: run.summary.heads, "{:.0f}".format),
    Column("FID ↓", "FID ↓", _metric("fid"), fid_text, min, "fid"),
    Column("FID∞ ↓", "FID∞ ↓", _metric("fid_infinity"), fid_text, min, optional=True),
    Column("sFID ↓", "sFID ↓", _metric("sfid"), fid_text, min, "sfid", optional=True),
    Column("IS ↑", "IS ↑", _metric("inception_score_mean"), "{:.2f}".format, max, "inception_score"),
    Column("KID ↓", "KID ↓", _metric("kid_mean"), significant, min, "kid"),
    Column("Precision ↑", "Prec ↑", _metric("precision"), "{:.3f}".format, max),
    Column("Recall ↑", "Rec ↑", _metric("recall"), "{:.3f}".format, max),
    Column("Density ↑", "Dens ↑", _metric("density"), "{:.3f}".format, max, optional=True),
    Column("Coverage ↑", "Cov ↑", _metric("coverage"), "{:.3f}".format, max, optional=True),
    Column("Class accuracy ↑", "Acc ↑", _metric("label_accuracy"), "{:.1%}".format, max, optional=True),
    Column("Time an image", "Time", lambda run: run.seconds_per_image, duration),
]


def metrics_table(runs: Sequence[Run]) -> MetricsTable:
    """The table of these runs. Of several students the best of each metric is marked, if they compare."""
    columns = [c for c in COLUMNS if not c.optional or any(c.value(run) is not None for run in runs)]
    students = [run for run in runs if not run.is_teacher]
    protocols = [run.metrics.protocol if run.metrics else None for run in runs]
    warning = protocol_warning(protocols)
    best = [None if warning else column.best_of(students) for column in columns]
    intervals = any(run.metrics and run.metrics.intervals for run in runs)
    return MetricsTable(
        titles=[f"{fid_title(runs)} ↓" if column.title == "FID ↓" else column.title for column in columns],
        short_titles=[column.short for column in columns],
        rows=[
            (
                run,
                [c.cell(run, None if run.is_teacher else b) for c, b in zip(columns, best, strict=True)],
            )
            for run in runs
        ],
        note=protocol_line(protocols) + " Brackets hold the 95 % interval by bootstrap." * intervals,
        warning=warning,
    )


def fid_title(runs: Sequence[Run]) -> str:
    """FID, named for the features that it is computed on."""
    features = {run.metrics.features for run in runs if run.metrics}
    name = features.pop() if len(features) == 1 else None
    return f"FID ({name})" if name else "FID"


def print_table(paths: Sequence[Path], console: Console | None = None) -> None:
    """Print the table of these runs to the terminal, in short: it fits 80 columns.

    Raises:
        UserError: a folder is no finished run, or a file in it is damaged.
    """
    table = metrics_table(read_runs(paths))
    lines = [
        ["Run", *table.short_titles],
        *([run.name, *(c.text for c in cells)] for run, cells in table.rows),
    ]
    best = {
        (i, j)
        for i, (_, cells) in enumerate(table.rows)
        for j, cell in enumerate(cells, start=1)
        if cell.best
    }
    console = console or Console()
    console.print(terminal(lines, frozenset(best)))
    console.print(Text(table.note, "dim"))
    if table.warning:
        console.print(Text(table.warning, "yellow"))
