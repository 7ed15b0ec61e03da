"""How a teacher squeezes, in one picture of the report's style."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from shd_diffusion.reporting.plot_style import (
    LIGHT,
    WIDTH,
    Line,
    Plot,
    finish,
    legend_above,
    panels,
    plot_styles,
)

STYLES = plot_styles(("closed form", "mean", "select", "by row", "joint", "matched"))
"""The strategies that are drawn."""


def plot_squeezing(results: dict[str, Any]) -> Plot:
    """Four panels: α of each merge, what blocks lose, what the output loses, and when α = 1/2 is not enough."""
    heads = results["squeezings"][0]["heads"]
    cases = {case["strategy"]: case for case in results["squeezings"] if case["heads"] == heads}
    with panels(2, 2, 2 * WIDTH, 6.4) as (figure, (alpha, loss, output, saved)):
        _coefficients(alpha, cases["closed form"])
        alpha.set_title(f"α of each merge to {heads} heads: mean, 5 to 95 %", loc="left")
        for name, style in STYLES.items():
            errors = [block["block_error"] for block in cases[name]["blocks"].values()]
            Line(name, style, range(len(errors)), errors).draw(loss)
            own = [case for case in results["squeezings"] if case["strategy"] == name]
            by_heads = sorted((case["heads"], case["output_error"]["mean"]) for case in own)
            Line(name, style, *zip(*by_heads, strict=True)).draw(output)
        loss.set(xlabel="attention block", ylabel="|O' - O| / |O|")
        loss.set_title(f"lost of a block's output at {heads} heads", loc="left")
        output.set(xlabel="heads after squeezing", ylabel="|ε' - ε|² / |ε|²")
        output.set_title("lost of the denoiser's output, all blocks squeezed", loc="left")
        for axes in (alpha, loss, output):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            axes.set_ylim(bottom=0)
        alpha.set_ylim(-0.03, 1.03)
        _saved(saved, results["blocks"])
        saved.set_title("saved by α over 1/2, each pair that merges first", loc="left")
        legend_above(figure, loss)
        return finish(figure, "squeezing", f"How {results['teacher']} squeezes", inline=False)


def _coefficients(axes: Axes, case: dict[str, Any]) -> None:
    """Of each block, its merges side by side."""
    colour = STYLES["closed form"].colour
    axes.axhline(0.5, color=LIGHT["muted"], linewidth=0.8)
    for place, block in enumerate(case["blocks"].values()):
        merges = block["coefficients"]
        for offset, merge in zip(np.linspace(-0.36, 0.36, len(merges) + 2)[1:-1], merges, strict=True):
            ends = merge["quantiles"][0], merge["quantiles"][-1]
            axes.plot([place + offset] * 2, ends, color=colour, linewidth=1.2, alpha=0.5)
            axes.plot(place + offset, merge["mean"], "o", color=colour, markersize=3)
    axes.set(xlabel="attention block", ylabel="α")


def _saved(axes: Axes, blocks: dict[str, Any]) -> None:
    """The share that α saves over how unequal the heads are, beside what uncorrelated heads would give."""
    pairs = [pair for block in blocks.values() for pair in block["pairs"]]
    imbalance, saved = ([pair[name] for pair in pairs] for name in ("imbalance", "saved"))
    axes.plot(imbalance, saved, "o", color=LIGHT["run-0"], markersize=3.5, alpha=0.6)
    ratio = np.linspace(1, max(2.0, *imbalance), 100)
    expected = ((ratio**2 - 1) / (ratio**2 + 1)) ** 2
    axes.plot(ratio, expected, color=LIGHT["muted"], linestyle=":", linewidth=1, label="if uncorrelated")
    axes.set(
        xlabel="|D X| of the stronger head over the weaker", ylabel="share of the squared error", ylim=(0, 1)
    )
    axes.legend(loc="upper left")
