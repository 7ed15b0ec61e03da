"""What was squeezed into what: the maps of one image, and α, weights, residual and divergence over many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from shd_diffusion.reporting.drawing import (
    LIGHT,
    Drawing,
    Look,
    data_uri,
    enlarge,
    finish,
    legend_above,
    mosaic,
    panel,
    panels,
)
from shd_diffusion.reporting.runs import Array, Attention, BlockAttention, Run

MAX_SIDE = 64
"""Pixels of a map: larger ones are shown reduced, by the mean over areas."""

COLOURS = LinearSegmentedColormap.from_list(
    "maps", ["#ffffff", "#d5e0f5", "#8fb0e8", "#4a6fc9", "#2c3a94", "#150f45"]
)
"""From nothing (white) to much (indigo); the page inverts it in the dark."""

SQUEEZE_LOOK = Look("ink", "o")
"""What belongs to the squeezing alone, and so to no run."""

SPREAD = "mean over samples and heads, the middle 80 % shaded"


@dataclass(frozen=True, slots=True)
class Head:
    """A map as the page shows it: of head `number`, from 1, with the figure that is told beside it."""

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
    weights: Drawing
    maps: Drawing


@dataclass(frozen=True, slots=True)
class AttentionView:
    """Students whose teacher, image and squeezing are the same, and so compare map by map."""

    runs: list[Run]
    image: str
    attention: Attention
    blocks: list[BlockView]
    statistics: list[Drawing]

    @property
    def drawings(self) -> list[Drawing]:
        return [*self.statistics, *(d for block in self.blocks for d in (block.weights, block.maps))]


def attention_views(runs: Sequence[Run], looks: dict[str, Look]) -> list[AttentionView]:
    """The runs that kept attention maps, those together that saw the same squeezed maps."""
    views: list[list[tuple[Run, Attention]]] = []
    for run in runs:
        if run.attention is None:
            continue
        kin = next((view for view in views if _same_maps(view[0][1], run.attention)), None)
        if kin is None:
            views.append(kin := [])
        kin.append((run, run.attention))
    return [
        _view(members, looks, "attention" if number == 1 else f"attention-{number}")
        for number, members in enumerate(views, start=1)
    ]


def _same_maps(a: Attention, b: Attention) -> bool:
    return len(a.blocks) == len(b.blocks) and all(
        x.name == y.name
        and x.squeezed.shape == y.squeezed.shape
        and np.allclose(x.squeezed, y.squeezed, atol=1e-5)
        for x, y in zip(a.blocks, b.blocks, strict=True)
    )


def _view(members: Sequence[tuple[Run, Attention]], looks: dict[str, Look], prefix: str) -> AttentionView:
    """One view; `prefix` begins the names of its figures."""
    attention = members[0][1]
    blocks = attention.blocks
    has_merges = any(block.coefficients.size for block in blocks)
    return AttentionView(
        runs=[run for run, _ in members],
        image=data_uri(enlarge(_input_image(attention.image), 96)),
        attention=attention,
        blocks=[
            _block([(run, kept.blocks[i]) for run, kept in members], f"{prefix}-block-{i}")
            for i in range(len(blocks))
        ],
        statistics=[
            divergences(members, looks, prefix),
            residuals(blocks, prefix),
            *([coefficients(blocks, prefix)] if has_merges else []),
        ],
    )


def _input_image(image: Array) -> NDArray[np.uint8]:
    """(C, H, W) in [-1, 1] as RGB; of a latent the first three channels."""
    channels = image[:3] if image.shape[0] >= 3 else image[:1].repeat(3, axis=0)
    return ((channels.transpose(1, 2, 0).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)


# --- the maps of one image ----------------------------------------------------------------------------------


def membership(weights: Array) -> list[list[int]]:
    """Which teacher heads each squeezed head is made of: a list a squeezed head, from (S, N, M)."""
    owner = weights.mean(axis=0).argmax(axis=0)
    return [np.flatnonzero(owner == head).tolist() for head in range(weights.shape[1])]


def _block(members: Sequence[tuple[Run, BlockAttention]], prefix: str) -> BlockView:
    """One block; `members` differ in the student's maps only."""
    block = members[0][1]
    teacher, squeezed = reduced(block.teacher), reduced(block.squeezed)
    students = [(run, kept, reduced(kept.student)) for run, kept in members]
    everything = [teacher, squeezed, *(maps for *_, maps in students)]
    brightest = float(np.quantile(np.concatenate([maps.ravel() for maps in everything]), 0.995)) or 1.0
    weights = block.weights.mean(axis=0)

    def head(maps: Array, number: int, detail: str) -> Head:
        return Head(number + 1, data_uri(enlarge(map_pixels(maps[number], brightest), MAX_SIDE)), detail)

    groups = [
        Group(
            teacher=[head(teacher, m, f"{weights[n, m]:.2f}") for m in heads],
            squeezed=head(squeezed, n, f"{block.residual[:, n].mean():#.2g}"),
            students=[
                (run, head(maps, n, f"{kept.divergence[:, n].mean():#.2g}")) for run, kept, maps in students
            ],
        )
        for n, heads in enumerate(membership(block.weights))
    ]
    rows = [("teacher", teacher), ("squeezed", squeezed), *((run.name, maps) for run, _, maps in students)]
    return BlockView(
        block.name, groups, brightest, head_weights(block, prefix), _draw_maps(rows, brightest, prefix)
    )


def reduced(maps: Array) -> Array:
    """Maps (H, Q, K) with at most `MAX_SIDE` rows and columns, by the mean over areas."""
    height, width = maps.shape[1:]
    factor = min(1.0, MAX_SIDE / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    pictures = (Image.fromarray(each.astype(np.float32)) for each in maps)
    return np.stack([np.asarray(picture.resize(size, Image.Resampling.BOX), float) for picture in pictures])


def map_pixels(values: Array, brightest: float) -> NDArray[np.uint8]:
    """A map (Q, K) as RGB pixels, `brightest` and more being darkest."""
    return np.asarray(COLOURS(np.clip(values / brightest, 0, 1), bytes=True)[..., :3])


def _draw_maps(rows: Sequence[tuple[str, Array]], brightest: float, prefix: str) -> Drawing:
    """All maps of a block as one figure, for documents that are not the page: a row for each kind of map."""
    with panels(len(rows), 1, 7.5, 1.0 * len(rows)) as (figure, axes):
        for ax, (title, maps) in zip(axes, rows, strict=True):
            pixels = [enlarge(map_pixels(each, brightest), MAX_SIDE) for each in maps]
            ax.imshow(mosaic([pixels], gap=6), interpolation="nearest")
            ax.set_title(title, loc="left")
            ax.axis("off")
        return finish(figure, f"{prefix}-maps", f"Attention maps: {prefix}", inline=False)


# --- statistics over many images ----------------------------------------------------------------------------


def head_weights(block: BlockAttention, prefix: str) -> Drawing:
    """Heat map (N, M) of the teacher's heads in each squeezed head, mean over the samples."""
    weights = block.weights.mean(axis=0)
    squeezed, teacher = weights.shape
    with panel(height=0.7 + 0.26 * squeezed) as (figure, axes):
        for n, m in np.argwhere(weights > 0.005):
            weight = weights[n, m]
            shade = {"color": SQUEEZE_LOOK.colour, "alpha": 0.5 * weight, "linewidth": 0}
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


def coefficients(blocks: Sequence[BlockAttention], prefix: str) -> Drawing:
    """Histogram of α, a ridge a block: all merges, all samples."""
    edges = np.linspace(0, 1, 41)
    with panel(height=0.8 + min(0.34 * len(blocks), 4)) as (figure, axes):
        for row, block in enumerate(blocks):
            heights, _ = np.histogram(block.coefficients, edges)
            base = len(blocks) - 1 - row
            ridge = base + 0.92 * heights / max(1, heights.max())
            axes.stairs(ridge, edges, baseline=base, fill=True, color=SQUEEZE_LOOK.colour, alpha=0.35)
            axes.stairs(ridge, edges, baseline=base, color=SQUEEZE_LOOK.colour, linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, len(blocks)), xlabel="α", ylabel="block")
        axes.set_yticks(range(len(blocks)), [str(i) for i in reversed(range(len(blocks)))])
        axes.axvline(0.5, color=LIGHT["muted"], linewidth=0.8, linestyle=":")
        description = (
            "α of every merge, by block: 0.5 is the plain mean of two heads, 0 and 1 are one of them alone"
        )
        return finish(figure, f"{prefix}-alpha", description)


def residuals(blocks: Sequence[BlockAttention], prefix: str) -> Drawing:
    """Residual of squeezing, block by block: mean over samples and heads, with the middle 80 %."""
    with panel() as (figure, axes):
        _by_block(axes, [block.residual for block in blocks], SQUEEZE_LOOK, "residual")
        axes.set(xlabel="block", ylabel="relative residual")
        axes.set_ylim(bottom=0)
        description = f"Share of the heads' output that squeezing loses, by block: {SPREAD}"
        return finish(figure, f"{prefix}-residual", description)


def divergences(members: Sequence[tuple[Run, Attention]], looks: dict[str, Look], prefix: str) -> Drawing:
    """Divergence of the squeezed maps to the student's, block by block and run by run."""
    with panel() as (figure, axes):
        for run, attention in members:
            _by_block(axes, [b.divergence for b in attention.blocks], looks[run.name], run.name)
        axes.set(xlabel="block", ylabel="divergence")
        axes.set_ylim(bottom=0)
        legend_above(figure, axes)
        description = f"Divergence of squeezed and student's maps after training, by block: {SPREAD}"
        return finish(figure, f"{prefix}-divergence", description)


def _by_block(axes: Axes, values: Sequence[Array], look: Look, label: str) -> None:
    """Mean and middle 80 % of the values of each block."""
    places = np.arange(len(values))
    low, high = np.array([np.quantile(each, (0.1, 0.9)) for each in values]).T
    axes.fill_between(places, low, high, color=look.colour, alpha=0.12, linewidth=0)
    means = [each.mean() for each in values]
    axes.plot(places, means, color=look.colour, marker=look.marker, markersize=5, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
