"""What was squeezed into what: the maps of one image, and α, weights, residual and divergence over many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.patches import Rectangle

from shd_diffusion.data.images import to_bytes
from shd_diffusion.reporting.attention_words import WordBlock, word_blocks
from shd_diffusion.reporting.maps import map_pixels
from shd_diffusion.reporting.pictures import Pixels, data_uri, enlarge, mosaic, picture_plot
from shd_diffusion.reporting.plot_style import LIGHT, Line, Plot, PlotStyle, Styles, finish, line_plot, panel
from shd_diffusion.reporting.runs import Array, Attention, BlockAttention, Run

SIDE = 64
"""Pixels of a map, at least."""

SQUEEZE_STYLE = PlotStyle("ink", "o")
"""What belongs to the squeezing alone, and so to no run."""


@dataclass(frozen=True, slots=True)
class Head:
    """A map as the page shows it: of head `number`, from 1, with the number that is told beside it."""

    number: int
    uri: str
    detail: str


@dataclass(frozen=True, slots=True)
class Group:
    """A squeezed head: the teacher's heads that it is made of, itself, and the same head of each student."""

    teacher: list[Head]
    squeezed: Head
    students: list[tuple[Run, Head]]


@dataclass(frozen=True, slots=True)
class BlockView:
    """One block of students that were distilled from the same teacher's maps."""

    name: str
    groups: list[Group]
    brightest: float
    weights: Plot
    maps: Plot


@dataclass(frozen=True, slots=True)
class AttentionView:
    """Students whose teacher, image and squeezing are the same, and so compare map by map."""

    runs: list[Run]
    image: str
    attention: Attention
    blocks: list[BlockView]
    words: list[WordBlock]
    statistics: list[Plot]

    @property
    def class_name(self) -> str:
        """Of the image, where it has a class."""
        label = self.attention.label
        return "" if label is None else self.runs[0].label_text(label)

    @property
    def plots(self) -> list[Plot]:
        maps = [plot for block in self.blocks for plot in (block.weights, block.maps)]
        return [*self.statistics, *maps, *(block.plot for block in self.words)]


def attention_views(runs: Sequence[Run], styles: Styles) -> list[AttentionView]:
    """The runs that kept attention maps, those together that saw the same squeezed maps."""
    views: list[list[tuple[Run, Attention]]] = []
    for run, attention in ((run, run.attention) for run in runs if run.attention):
        view = next((view for view in views if _same_maps(view[0][1], attention)), None)
        if view is None:
            views.append(view := [])
        view.append((run, attention))
    return [
        _view(members, styles, "attention" if number == 1 else f"attention-{number}")
        for number, members in enumerate(views, start=1)
    ]


def _same_maps(a: Attention, b: Attention) -> bool:
    return len(a.blocks) == len(b.blocks) and all(
        x.name == y.name
        and x.squeezed.shape == y.squeezed.shape
        and np.allclose(x.squeezed, y.squeezed, atol=1e-5)
        for x, y in zip(a.blocks, b.blocks, strict=True)
    )


def _view(members: Sequence[tuple[Run, Attention]], styles: Styles, prefix: str) -> AttentionView:
    """One view; `prefix` begins the names of its plots."""
    attention = members[0][1]
    blocks = attention.blocks
    kept = [(run.name, styles[run.name], [block.divergence for block in own.blocks]) for run, own in members]
    lost = [("residual", SQUEEZE_STYLE, [block.residual for block in blocks])]
    return AttentionView(
        runs=[run for run, _ in members],
        image=data_uri(enlarge(_input_image(attention.image), 96)),
        attention=attention,
        blocks=[
            _block([(run, kept.blocks[i]) for run, kept in members], f"{prefix}-block-{i}")
            for i in range(len(blocks))
        ],
        words=word_blocks(members, prefix),
        statistics=[
            by_block(prefix, "Divergence of squeezed and student's maps after training", "divergence", kept),
            by_block(prefix, "Share of the heads' output that squeezing loses", "relative residual", lost),
            *([coefficients(blocks, prefix)] if any(block.coefficients.size for block in blocks) else []),
        ],
    )


def by_block(
    prefix: str, shows: str, label: str, curves: Sequence[tuple[str, PlotStyle, Sequence[Array]]]
) -> Plot:
    """Mean and middle 80 % of the values (S, N) of each block, a line for each name and style."""
    lines = []
    for called, style, values in curves:
        low, high = np.array([np.quantile(each, (0.1, 0.9)) for each in values]).T
        lines.append(Line(called, style, range(len(values)), [each.mean() for each in values], low, high))
    description = f"{shows}, by block: mean over samples and heads, the middle 80 % shaded"
    return line_plot(f"{prefix}-{label.split()[-1]}", description, ("block", label), lines)


def _input_image(image: Array) -> Pixels:
    """(C, H, W) in [-1, 1] as RGB; of a latent, where it could not be decoded, the first three channels."""
    channels = image[:3] if image.shape[0] >= 3 else image[:1].repeat(3, axis=0)
    return to_bytes(torch.from_numpy(channels.transpose(1, 2, 0))).numpy()


# --- the maps of one image ----------------------------------------------------------------------------------


def membership(weights: Array) -> list[list[int]]:
    """Which teacher heads each squeezed head is made of: a list a squeezed head, from (S, N, M)."""
    owner = weights.mean(axis=0).argmax(axis=0)
    return [np.flatnonzero(owner == head).tolist() for head in range(weights.shape[1])]


def _block(members: Sequence[tuple[Run, BlockAttention]], prefix: str) -> BlockView:
    """One block; `members` differ in the student's maps only."""
    block = members[0][1]
    students = [(run.name, kept.student) for run, kept in members]
    kinds = [("teacher", block.teacher), ("squeezed", block.squeezed), *students]
    brightest = float(np.quantile(np.concatenate([maps.ravel() for _, maps in kinds]), 0.995)) or 1.0
    weights = block.weights.mean(axis=0)

    def pixels(attention_map: Array) -> Pixels:
        return enlarge(map_pixels(attention_map, brightest), SIDE)

    def head(maps: Array, number: int, detail: str) -> Head:
        return Head(number + 1, data_uri(pixels(maps[number])), detail)

    groups = [
        Group(
            teacher=[head(block.teacher, m, f"{weights[n, m]:.2f}") for m in heads],
            squeezed=head(block.squeezed, n, f"{block.residual[:, n].mean():#.2g}"),
            students=[
                (run, head(kept.student, n, f"{kept.divergence[:, n].mean():#.2g}")) for run, kept in members
            ],
        )
        for n, heads in enumerate(membership(block.weights))
    ]
    rows = [(kind, mosaic([[pixels(each) for each in maps]], gap=6)) for kind, maps in kinds]
    picture = picture_plot(f"{prefix}-maps", f"Attention maps: {prefix}", rows, width=7.5, below=True)
    return BlockView(block.name, groups, brightest, head_weights(block, prefix), picture)


# --- statistics over many images ----------------------------------------------------------------------------


def head_weights(block: BlockAttention, prefix: str) -> Plot:
    """Heat map (N, M) of the teacher's heads in each squeezed head, mean over the samples."""
    weights = block.weights.mean(axis=0)
    squeezed, teacher = weights.shape
    with panel(height=0.7 + 0.26 * squeezed) as (figure, axes):
        for n, m in np.argwhere(weights > 0.005):
            weight = weights[n, m]
            shade = {"color": SQUEEZE_STYLE.colour, "alpha": 0.5 * weight, "linewidth": 0}
            axes.add_patch(Rectangle((m + 0.53, n + 0.53), 0.94, 0.94, **shade))
            if teacher <= 16:
                text = "1" if weight > 0.995 else f"{weight:.2f}"[1:]
                axes.text(m + 1, n + 1, text, ha="center", va="center", size=7)
        axes.set(xlim=(0.5, teacher + 0.5), ylim=(squeezed + 0.5, 0.5))
        axes.set(xlabel="teacher's head", ylabel="squeezed head")
        axes.set_xticks(range(1, teacher + 1, max(1, teacher // 12)))
        axes.set_yticks(range(1, squeezed + 1, max(1, squeezed // 8)))
        axes.grid(False)
        return finish(figure, f"{prefix}-weights", f"Weights of the teacher's heads in {block.name}")


def coefficients(blocks: Sequence[BlockAttention], prefix: str) -> Plot:
    """Histogram of α, a ridge a block: all merges, all samples."""
    edges = np.linspace(0, 1, 41)
    with panel(height=0.8 + min(0.34 * len(blocks), 4)) as (figure, axes):
        for row, block in enumerate(blocks):
            heights, _ = np.histogram(block.coefficients, edges)
            base = len(blocks) - 1 - row
            ridge = base + 0.92 * heights / max(1, heights.max())
            axes.stairs(ridge, edges, baseline=base, fill=True, color=SQUEEZE_STYLE.colour, alpha=0.35)
            axes.stairs(ridge, edges, baseline=base, color=SQUEEZE_STYLE.colour, linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, len(blocks)), xlabel="α", ylabel="block")
        axes.set_yticks(range(len(blocks)), [str(i) for i in reversed(range(len(blocks)))])
        axes.axvline(0.5, color=LIGHT["muted"], linewidth=0.8, linestyle=":")
        description = (
            "α of every merge, by block: 0.5 is the plain mean of two heads, 0 and 1 are one of them alone"
        )
        return finish(figure, f"{prefix}-alpha", description)
