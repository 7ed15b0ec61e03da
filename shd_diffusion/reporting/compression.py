"""What `compress` took from each module of a model, and what that module's output lost by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from shd_diffusion.reporting.plot_style import Line, Plot, Styles, finish, fit_scale, legend_above, panels
from shd_diffusion.reporting.runs import Compression, Part, Run

LOST = {"heads": "lost output of attention", "neurons": "lost output of feed-forward"}


def compression_plots(runs: Sequence[Run], styles: Styles) -> list[Plot]:
    """Heads and neurons that stayed, module by module in the order in which they run, and below what it lost."""
    found = [(run, run.compression) for run in runs if run.compression]
    kinds: tuple[Literal["heads", "neurons"], ...] = ("heads", "neurons")
    return [plot for what in kinds for plot in _plot(what, found, styles)]


def _plot(
    what: Literal["heads", "neurons"], found: Sequence[tuple[Run, Compression]], styles: Styles
) -> list[Plot]:
    chosen = [(run, parts) for run, each in found if (parts := [p for p in each.parts if p.what == what])]
    if not chosen:
        return []
    names = list(dict.fromkeys(part.name for _, parts in chosen for part in parts))
    names.sort(key=_in_order)
    with panels(2, 1, 5.2, 3.9) as (figure, (above, below)):
        for run, parts in chosen:
            places = [names.index(part.name) for part in parts]
            style = styles[run.name]
            Line(run.name, style, places, [part.after for part in parts]).draw(above)
            below.plot(
                places, [part.lost for part in parts], style.marker, color=style.colour, ls="-", ms=4.5
            )
        most = {part.name: part.before for _, parts in chosen for part in parts}
        above.plot(
            range(len(names)), [most[name] for name in names], "--", lw=0.8, color="0.5", label="teacher"
        )
        above.set_ylim(0, 1.15 * max(most.values()))
        above.set(ylabel=what)
        below.set(xlabel="module, in the order in which they run", ylabel=LOST[what])
        fit_scale(below, "y", np.array([part.lost for _, parts in chosen for part in parts]))
        for axes in (above, below):
            axes.set_xticks(range(len(names)) if len(names) <= 20 else range(0, len(names), 4))
        legend_above(figure, above)
        listing = "; ".join(f"{run.name} {sum(p.after for p in parts)} of {sum(p.before for p in parts)}"
                            for run, parts in chosen)  # fmt: skip
        return [
            finish(figure, f"squeezed-{what}", f"{what} that stayed and what their modules lost: {listing}")
        ]


def compression_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """By module what is left of it in each compressed run; a dash where all of it is."""
    found = [run.compression for run in runs if run.compression]
    names = sorted({part.name for each in found for part in each.parts}, key=_in_order)
    by_name = [{part.name: part for part in each.parts} for each in found]
    return [(name, [_told(parts.get(name)) for parts in by_name]) for name in names]


def _told(part: Part | None) -> str:
    if part is None:
        return "–"
    if part.what == "block":
        return f"left; the model's output changes by {part.lost:.4f} without it"
    return f"{part.after} of {part.before} {part.what}, lost {part.lost:.4f}"


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sorts blocks by their numbers."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]
