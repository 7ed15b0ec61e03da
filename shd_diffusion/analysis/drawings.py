"""How a teacher squeezes, in one picture of the report's style."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from shd_diffusion.reporting.drawing import LIGHT, WIDTH, Drawing, Look, finish, legend_above, panels
from shd_diffusion.study.drawings import looks

SHOWN = ("closed form", "mean", "select", "by row", "joint", "matched")


def draw_squeezing(results: dict[str, Any]) -> Drawing:
    """Four panels: α of each merge, what blocks lose, what the output loses, and when α = 1/2 is not enough."""
    look = looks(SHOWN)
    heads = results["squeezings"][0]["heads"]
    cases = {case["strategy"]: case for case in results["squeezings"] if case["heads"] == heads}
    with panels(2, 2, 2 * WIDTH, 6.4) as (figure, (alpha, loss, output, saved)):
        _coefficients(alpha, cases["closed form"], look["closed form"])
        alpha.set_title(f"α of each merge to {heads} heads: mean, 5 to 95 %", loc="left")
        _blocks(loss, cases, look)
        loss.set_title(f"lost of a block's output at {heads} heads", loc="left")
        _output(output, results["squeezings"], look)
        output.set_title("lost of the denoiser's output, all blocks squeezed", loc="left")
        _saved(saved, results["blocks"])
        saved.set_title("saved by α over 1/2, each pair that merges first", loc="left")
        legend_above(figure, loss)
        return finish(figure, "squeezing", f"How {results['teacher']} squeezes", inline=False)


def _coefficients(axes: Axes, case: dict[str, Any], look: Look) -> None:
    axes.axhline(0.5, color=LIGHT["muted"], linewidth=0.8)
    for place, block in enumerate(case["blocks"].values()):
        merges = block["coefficients"]
        for offset, merge in zip(np.linspace(-0.36, 0.36, len(merges) + 2)[1:-1], merges, strict=True):
            ends = merge["quantiles"][0], merge["quantiles"][-1]
            axes.plot([place + offset] * 2, ends, color=look.colour, linewidth=1.2, alpha=0.5)
            axes.plot(place + offset, merge["mean"], "o", color=look.colour, markersize=3)
    axes.set(xlabel="attention block", ylabel="α", ylim=(-0.03, 1.03))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _blocks(axes: Axes, cases: dict[str, dict[str, Any]], look: dict[str, Look]) -> None:
    for name in SHOWN:
        losses = [block["block_error"] for block in cases[name]["blocks"].values()]
        axes.plot(losses, color=look[name].colour, marker=look[name].marker, markersize=4, label=name)
    axes.set(xlabel="attention block", ylabel="|O' - O| / |O|")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _output(axes: Axes, squeezings: list[dict[str, Any]], look: dict[str, Look]) -> None:
    for name in SHOWN:
        own = sorted((c["heads"], c["output_error"]["mean"]) for c in squeezings if c["strategy"] == name)
        counts, errors = zip(*own, strict=True)
        axes.plot(counts, errors, color=look[name].colour, marker=look[name].marker, markersize=4)
    axes.set(xlabel="heads after squeezing", ylabel="|ε' - ε|² / |ε|²")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _saved(axes: Axes, blocks: dict[str, Any]) -> None:
    pairs = [pair for block in blocks.values() for pair in block["pairs"]]
    strengths = [pair["imbalance"] for pair in pairs]
    axes.plot(
        strengths, [pair["saved"] for pair in pairs], "o", color=LIGHT["run-0"], markersize=3.5, alpha=0.6
    )
    ratio = np.linspace(1, max(2.0, *strengths), 100)
    expected = ((ratio**2 - 1) / (ratio**2 + 1)) ** 2
    axes.plot(ratio, expected, color=LIGHT["muted"], linestyle=":", linewidth=1, label="if uncorrelated")
    axes.set(
        xlabel="|D X| of the stronger head over the weaker", ylabel="share of the squared error", ylim=(0, 1)
    )
    axes.legend(loc="upper left")
