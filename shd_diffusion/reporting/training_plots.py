"""What happened while training: every term of the loss, its share, SHD's by block, and the validation's metrics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shd_diffusion.reporting.metrics_table import distance_of
from shd_diffusion.reporting.plot_style import (
    DEPTH_COLOURS,
    LIGHT,
    RUN_COLOURS,
    Line,
    Plot,
    Styles,
    finish,
    legend_above,
    line_plot,
    logarithmic_ticks,
    panel,
    smooth,
)
from shd_diffusion.reporting.runs import Array, Log, Run

MAX_POINTS = 400
"""Points drawn a curve: more are not seen on a page and make it heavy."""

TERM_COLOURS = {"denoise": LIGHT["muted"], "output": LIGHT["run-4"], "shd": LIGHT["run-5"]}


def loss_curves(runs: Sequence[Run], styles: Styles) -> list[Plot]:
    """One panel a term: unweighted values on a logarithmic scale, the mean in front of the raw steps; points are the
    validation's, on fixed items, and dots its teacher's on the same."""
    by_term: dict[str, list[tuple[Run, Log]]] = {}
    for run in runs:
        if run.log:
            for term, values in run.log.values.items():
                if (values > 0).any():  # otherwise there is nothing to draw on a logarithmic scale
                    by_term.setdefault(term, []).append((run, run.log))
    return [_term_panel(term, logs, styles) for term, logs in by_term.items()]


def _term_panel(term: str, logs: Sequence[tuple[Run, Log]], styles: Styles) -> Plot:
    with panel() as (figure, axes):
        for run, log in logs:
            colour, values = styles[run.name].colour, log.values[term]
            chosen = _thin(len(values))
            axes.plot(log.steps[chosen], values[chosen], color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(log.steps[chosen], _running_mean(values)[chosen], color=colour, label=run.name)
            if term in log.validation_terms:
                steps, fixed = log.validation_terms[term].T
                axes.plot(
                    steps,
                    fixed,
                    "o--",
                    color=colour,
                    markersize=3,
                    linewidth=0.8,
                    label=f"{run.name}, validation",
                )
            if term in log.teacher_terms:
                axes.plot(*log.teacher_terms[term].T, ":", color=colour, label=f"{run.name}, its teacher")
        axes.set(xlabel="step", ylabel=f"{term}, unweighted", yscale="log")
        logarithmic_ticks(axes.yaxis)
        legend_above(figure, axes)
        names = ", ".join(run.name for run, _ in logs)
        return finish(figure, f"loss-{term}", f"Loss term {term} over training steps: {names}")


def loss_shares(runs: Sequence[Run]) -> list[Plot]:
    """One panel a run that has several terms: the part of each in the total loss."""
    return [_share_panel(run, run.log) for run in runs if run.log and len(run.log.shares) > 1]


def _share_panel(run: Run, log: Log) -> Plot:
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


def shd_by_block(runs: Sequence[Run]) -> list[Plot]:
    """One panel a run that logged it: SHD's term block by block, running means, on a scale that all share."""
    logs = [(run, run.log) for run in runs if run.log and run.log.divergences]
    means = [[_running_mean(values) for values in log.divergences.values()] for _, log in logs]
    seen = np.concatenate([curve for curves in means for curve in curves]) if logs else np.empty(0)
    seen = seen[np.isfinite(seen) & (seen > 0)]
    if not len(seen):
        return []
    limits = 0.9 * seen.min(), 1.1 * seen.max()
    return [_block_panel(run, log, curves, limits) for (run, log), curves in zip(logs, means, strict=True)]


def _block_panel(run: Run, log: Log, curves: Sequence[Array], limits: tuple[float, float]) -> Plot:
    shades = depth_shades(len(curves))
    with panel(height=3.0) as (figure, axes):
        for block, (mean, shade) in enumerate(zip(curves, shades, strict=True)):
            chosen = _thin(len(mean))
            colour = LIGHT[DEPTH_COLOURS[shade]]
            (line,) = axes.plot(log.steps[chosen], mean[chosen], color=colour, linewidth=1.2)
            alike = [str(other) for other, its in enumerate(shades) if its == shade]
            if str(block) == alike[0]:
                line.set_label("block " * (block == 0) + "-".join(dict.fromkeys((alike[0], alike[-1]))))
        axes.set(xlabel="step", ylabel="divergence", yscale="log", ylim=limits)
        logarithmic_ticks(axes.yaxis)
        axes.set_title(run.name, loc="left")
        legend_above(figure, axes)
        return finish(figure, f"divergence-{run.name}", f"Divergence by block over the steps of {run.name}")


def depth_shades(blocks: int) -> list[int]:
    """Which of the colours of depth each block has: all of one's own, or neighbours the same if they are many."""
    shades = len(DEPTH_COLOURS)
    if blocks > shades:
        return [block * shades // blocks for block in range(blocks)]
    return np.linspace(0, shades - 1, blocks).round().astype(int).tolist()


def validation_fid(runs: Sequence[Run], styles: Styles) -> list[Plot]:
    """Fréchet distance while training, on few samples; nothing where no run computed it."""
    lines = [
        Line(run.name, styles[run.name], *run.log.validation.T)
        for run in runs
        if run.log and len(run.log.validation)
    ]
    title = distance_of(runs)
    description, names = f"{title} on few samples over training steps", ("step", f"{title}, validation")
    return [line_plot("fid-validation", description, names, lines)] if lines else []


def _running_mean(values: Array) -> Array:
    """Running mean, geometric as the scale is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(smooth(np.log(values), _window(values)))


def _thin(count: int) -> Array:
    """Indices of at most `MAX_POINTS` of `count` points, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int))


def _window(values: Array) -> int:
    return max(1, len(values) // 20)
