"""Tables as lines of text, headings first: as Markdown, as CSV, and on a terminal; and numbers as short text."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from shd_diffusion.progress import printable

Lines = list[list[str]]


def terminal(
    lines: Lines, best: frozenset[tuple[int, int]] = frozenset(), left: int = 1, title: str = ""
) -> Table:
    """A table for a terminal: `best` cells (row, column) in green; the first `left` columns flush left, and folded
    where they are too long, since paths often differ at their ends alone."""
    head, *rows = lines
    table = Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for number, name in enumerate(head):
        if number < left:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        table.add_row(
            *(Text(printable(cell), "bold green" if (i, j) in best else "") for j, cell in enumerate(row))
        )
    return table


def markdown(lines: Lines) -> str:
    """A table in GitHub's Markdown."""
    head, *rows = lines
    ruled = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(escape_markdown, line))} |" for line in ruled) + "\n"


def escape_markdown(text: str) -> str:
    """Text on one line in which no character means anything to Markdown or HTML."""
    text = re.sub(r"[\\`*\[\]|#$~]|\b_|_\b", r"\\\g<0>", printable(text))  # `_` within a word is a plain one
    return text.replace("&", "&amp;").replace("<", "&lt;")


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """CSV with every key as a column; a row that lacks one leaves it empty."""
    lines, text = list(rows), io.StringIO()
    columns = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def significant(value: float) -> str:
    """A number in three figures: 9.74, 0.00120, 1043."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:.0f}"


def count(value: float) -> str:
    """A large number in three figures: 71.3 k, 675 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time in three figures: 4.21 ms, 1.3 s, 1210 s."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:.0f} s"
