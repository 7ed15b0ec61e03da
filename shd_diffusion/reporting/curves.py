"""What happened while training: every term of the loss, its share, and the watched Fréchet distance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from shd_diffusion.reporting.drawing import (
    LIGHT,
    RUN_COLOURS,
    Drawing,
    Look,
    finish,
    legend_above,
    panel,
    smooth,
)
from shd_diffusion.reporting.runs import Array, Log, Run

MAX_POINTS = 400
"""Points drawn a curve: more are not seen on a page and make it heavy."""

TERM_COLOURS = {"denoise": LIGHT["muted"], "output": LIGHT["run-4"], "shd": LIGHT["run-5"]}


def loss_curves(runs: Sequence[Run], looks: dict[str, Look]) -> list[Drawing]:
    """One panel a term: unweighted values on a logarithmic scale, the mean in front of the raw steps."""
    by_term: dict[str, list[tuple[Run, Log]]] = {}
    for run in runs:
        if run.log:
            for term, values in run.log.values.items():
                if (values > 0).any():  # otherwise there is nothing to draw on a logarithmic scale
                    by_term.setdefault(term, []).append((run, run.log))
    return [_term_panel(term, logs, looks) for term, logs in by_term.items()]


def _term_panel(term: str, logs: Sequence[tuple[Run, Log]], looks: dict[str, Look]) -> Drawing:
    with panel() as (figure, axes):
        for run, log in logs:
            look = looks[run.name]
            values = log.values[term]
            with np.errstate(divide="ignore", invalid="ignore"):
                mean = np.exp(smooth(np.log(values), _window(values)))  # geometric, as the scale is
            chosen = _thin(len(values))
            axes.plot(log.steps[chosen], values[chosen], color=look.colour, linewidth=0.8, alpha=0.35)
            axes.plot(log.steps[chosen], mean[chosen], color=look.colour, label=run.name)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="step", ylabel=f"{term}, unweighted")
        legend_above(figure, axes)
        names = ", ".join(run.name for run, _ in logs)
        return finish(figure, f"loss-{term}", f"Loss term {term} over training steps: {names}")


def loss_shares(runs: Sequence[Run]) -> list[Drawing]:
    """One panel a run that has several terms: the part of each in the total loss."""
    return [_share_panel(run, run.log) for run in runs if run.log and len(run.log.shares) > 1]


def _share_panel(run: Run, log: Log) -> Drawing:
    chosen = _thin(len(log.steps))
    shares = [np.nan_to_num(smooth(share, _window(share)))[chosen] for share in log.shares.values()]
    spare = iter(RUN_COLOURS * len(shares))
    colours = [TERM_COLOURS.get(term) or LIGHT[next(spare)] for term in log.shares]
    with panel(height=2.4) as (figure, axes):
        axes.stackplot(
            log.steps[chosen], shares, labels=list(log.shares), colors=colours, alpha=0.75, linewidth=0
        )
        axes.set(xlabel="step", ylabel="share of the loss", ylim=(0, 1))
        axes.set_title(run.name, loc="left")
        axes.margins(x=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        legend_above(figure, axes)
        return finish(figure, f"shares-{run.name}", f"Share of each term in the loss of {run.name}")


def watched_fid(runs: Sequence[Run], looks: dict[str, Look]) -> Drawing | None:
    """Fréchet distance while training, on few samples; None where no run watched it."""
    watched = [(run, run.log.watched) for run in runs if run.log and len(run.log.watched)]
    if not watched:
        return None
    with panel() as (figure, axes):
        for run, points in watched:
            look = looks[run.name]
            axes.plot(*points.T, color=look.colour, marker=look.marker, markersize=4, label=run.name)
        axes.set(xlabel="step", ylabel="FID, watched")
        axes.set_ylim(bottom=0)
        legend_above(figure, axes)
        return finish(figure, "fid-watched", "FID on few samples over training steps")


def _thin(count: int) -> Array:
    """Indices of at most `MAX_POINTS` of `count` points, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int))


def _window(values: Array) -> int:
    return max(1, len(values) // 20)
