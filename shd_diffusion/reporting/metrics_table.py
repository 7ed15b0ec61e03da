"""The table of results: a line a run, a column a metric, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from shd_diffusion.evaluation.extractors import distance_title
from shd_diffusion.evaluation.fid import FID
from shd_diffusion.evaluation.metric import Column
from shd_diffusion.evaluation.metrics import columns, higher_is_better
from shd_diffusion.reporting.cost import (
    PARAMETERS,
    SAMPLING_TIME,
    TRAINING_TIME,
    Cost,
    measured_costs,
    share,
    unequal_lengths,
)
from shd_diffusion.reporting.runs import AgainstTeacher, Run, read_runs
from shd_diffusion.reporting.tables import significant, terminal
from shd_diffusion.settings_table import protocol_line, protocol_warning

ARROWS = {"higher": "↑", "lower": "↓"}
FRECHET = {"fid": "", "fid_infinity": "∞"}
"""The Fréchet distances on an extractor's own features by their keys, and what tells their names apart."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A number as text, its standard deviation or interval if known, and whether it is the best."""

    text: str
    spread: str = ""
    best: bool = False

    def __str__(self) -> str:
        return self.text + self.spread


@dataclass(frozen=True, slots=True)
class MetricsTable:
    """A row of cells a run; `note` is the protocol of the metrics, `warning` says why they do not compare.

    A column whose short title is empty has no place on a terminal.
    """

    titles: list[str]
    short_titles: list[str]
    rows: list[tuple[Run, list[Cell]]]
    note: str
    warning: str | None

    @property
    def marks(self) -> bool:
        """Whether the best metrics are marked."""
        return any(cell.best for _, cells in self.rows for cell in cells)


def metrics_table(runs: Sequence[Run]) -> MetricsTable:
    """The table of these runs. Of several students the best of each metric is marked, if they compare."""
    shown = [column for column in columns() if any(run.metric(column.key) is not None for run in runs)]
    protocols = [run.metrics.protocol if run.metrics else None for run in runs]
    warning = protocol_warning(protocols)
    best = (
        {}
        if warning
        else {column.key: _best([r for r in runs if not r.is_teacher], column.key) for column in shown}
    )

    costs = measured_costs(runs) or [SAMPLING_TIME]
    costs += [TRAINING_TIME] if any(run.training_seconds for run in runs) else []

    def row(run: Run) -> list[Cell]:
        metrics = [_cell(run, column, None if run.is_teacher else best.get(column.key)) for column in shown]
        first, *others = (_cost_cell(run, cost, runs) for cost in (PARAMETERS, *costs))
        return [first, Cell(str(run.summary.heads)), *metrics, *others]

    arrows = [ARROWS[column.better] for column in shown]
    titles = [title_of(column, runs) for column in shown]
    shorts = [f"{short_title_of(column, runs)} {arrow}" for column, arrow in zip(shown, arrows, strict=True)]
    return MetricsTable(
        [PARAMETERS.title, "Heads", *map("{} {}".format, titles, arrows), *(cost.title for cost in costs)],
        [PARAMETERS.short, "Heads", *shorts, *(cost.short for cost in costs)],
        [(run, row(run)) for run in runs],
        protocol_line(protocols),
        warning,
    )


def _best(students: Sequence[Run], key: str) -> float | None:
    """The best value of a metric, where there is a choice."""
    values = [value for run in students if (value := run.metric(key)) is not None]
    return (max if higher_is_better(key) else min)(values) if len(values) > 1 else None


def _cell(run: Run, column: Column, best: float | None) -> Cell:
    value, deviation = run.metric(column.key), run.metric(column.deviation or "")
    spread = "" if deviation is None else f" ± {text_of(column, deviation)}"
    spread += interval_text(column, run.metric(f"{column.key}_low"), run.metric(f"{column.key}_high"))
    return Cell("–") if value is None else Cell(text_of(column, value), spread, value == best)


def _cost_cell(run: Run, cost: Cost, runs: Sequence[Run]) -> Cell:
    value, times = cost.of(run), share(run, cost, runs)
    return Cell("–" if value is None else cost.text(value), "" if times is None else f" ({times:.2f}x)")


def interval_text(column: Column, low: float | None, high: float | None) -> str:
    """A 95 % interval behind its value; nothing where it is not known."""
    return "" if low is None or high is None else f" [{text_of(column, low)}, {text_of(column, high)}]"


def headline(runs: Sequence[Run]) -> Column | None:
    """The metric that runs are ranked by: the first of the table that any of them has."""
    return next((c for c in columns() if any(run.metric(c.key) is not None for run in runs)), None)


def text_of(column: Column, value: float) -> str:
    """A metric as it is printed."""
    return format(value, column.format) if column.format else significant(value)


def frechet_title(key: str, features: str | None) -> str | None:
    """What a Fréchet distance on an extractor's features is called, where these are known; None of other metrics."""
    if key not in FRECHET:
        return None
    kind, *named = (distance_title(features) if features else "FID").split(" ", 1)
    return " ".join([kind + FRECHET[key], *named])


def title_of(column: Column, runs: Sequence[Run]) -> str:
    """A metric's title; a Fréchet distance is named for the features that it is computed on."""
    features = {run.metrics.features for run in runs if run.metrics}
    return frechet_title(column.key, features.pop() if len(features) == 1 else None) or column.title


def distance_of(runs: Sequence[Run]) -> str:
    """What the Fréchet distance of these runs is called."""
    return title_of(FID.columns[0], runs)


def short_title_of(column: Column, runs: Sequence[Run]) -> str:
    """The same for where space is scarce; of a Fréchet distance without the features, FID or FD as its title says."""
    return without_features(title_of(column, runs)) if column.key in FRECHET else column.short


def without_features(title: str) -> str:
    """The title of a Fréchet distance, in short."""
    return title.split(" (")[0]


# --- student against teacher ----------------------------------------------------------------------------------------

MEASURES = [
    Column("latent_mse", "Latents, squared error", "MSE", "lower"),
    Column("latent_relative_mse", "Latents, relative error", "rel.", "lower", ".1%"),
    Column("feature_cosine", "Features, cosine", "cos", "higher", ".3f"),
    Column("lpips", "LPIPS", "LPIPS", "lower", ".3f"),
]


def against_teacher_table(runs: Sequence[Run]) -> MetricsTable | None:
    """How far the images of students are from their teacher's of the same noise; None where none was compared."""
    compared = [(run, run.metrics.against_teacher) for run in runs if run.metrics]
    students = [(run, against) for run, against in compared if against and against.measures]
    if not students:
        return None
    shown = [column for column in MEASURES if any(column.key in found.measures for _, found in students)]
    protocols = [found.protocol for _, found in students]
    warning = protocol_warning(protocols)

    def best(column: Column) -> float | None:
        means = [found.measures[column.key].mean for _, found in students if column.key in found.measures]
        return None if warning or len(means) < 2 else (max if column.better == "higher" else min)(means)

    return MetricsTable(
        [f"{column.title} {ARROWS[column.better]}" for column in shown],
        [f"{column.short} {ARROWS[column.better]}" for column in shown],
        [(run, [_estimate(found, column, best(column)) for column in shown]) for run, found in students],
        protocol_line(protocols),
        warning,
    )


def _estimate(found: AgainstTeacher, column: Column, best: float | None) -> Cell:
    """A mean with its interval."""
    value = found.measures.get(column.key)
    if value is None:
        return Cell("–")
    interval = interval_text(column, value.low, value.high)
    return Cell(text_of(column, value.mean), interval, value.mean == best)


def print_table(paths: Sequence[Path], console: Console | None = None) -> None:
    """Print the tables of these runs to the terminal, in short: they fit 80 columns.

    Raises:
        UserError: a folder is no finished run, or a file in it is damaged.
    """
    runs, console = read_runs(paths), console or Console()
    against = against_teacher_table(runs)
    for table in (metrics_table(runs), *([against] if against else [])):
        _print(table, "Run" if table is not against else "Against the teacher", console)
    if unequal := unequal_lengths(runs):
        console.print(Text(unequal, "yellow"))


def _print(table: MetricsTable, first: str, console: Console) -> None:
    shown = [column for column, short in enumerate(table.short_titles) if short]
    rows = [(run.name, [cells[column] for column in shown]) for run, cells in table.rows]
    lines = [
        [first, *(table.short_titles[column] for column in shown)],
        *([name, *(cell.text for cell in cells)] for name, cells in rows),
    ]
    best = {(i, j) for i, (_, cells) in enumerate(rows) for j, cell in enumerate(cells, start=1) if cell.best}
    console.print(terminal(lines, frozenset(best)))
    console.print(Text(table.note, "dim"))
    if table.warning:
        console.print(Text(table.warning, "yellow"))
