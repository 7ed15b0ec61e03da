"""Which word of its prompt each patch of an image attends to: the teacher's, the squeezed and the students' maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shd_diffusion.reporting.maps import map_pixels
from shd_diffusion.reporting.pictures import data_uri, enlarge, mosaic, picture_plot
from shd_diffusion.reporting.plot_style import Plot
from shd_diffusion.reporting.runs import Array, Attention, BlockAttention, Run, Word
from shd_diffusion.reporting.tables import significant

MAX_WORDS = 16


@dataclass(frozen=True, slots=True)
class WordMap:
    """Where one model attends to a word: the picture, and the word's mean share of the attention."""

    kind: str
    uri: str
    share: str


@dataclass(frozen=True, slots=True)
class WordView:
    """A word, and its maps of teacher, squeezed heads and each student; `encoder` where there are several."""

    text: str
    encoder: str | None
    maps: list[WordMap]


@dataclass(frozen=True, slots=True)
class WordBlock:
    """A block and the words that are shown of it; `number` counts all blocks from 0."""

    number: int
    name: str
    words: list[WordView]
    left_out: int
    plot: Plot


def word_blocks(members: Sequence[tuple[Run, Attention]], prefix: str) -> list[WordBlock]:
    """The first, the middle and the last block in which patches attend to words.

    Args:
        members: runs that differ in the student's maps only.
        prefix: begins the names of the plots.
    """
    attention = members[0][1]
    able = [number for number, block in enumerate(attention.blocks) if block.text]
    chosen = dict.fromkeys([able[0], able[len(able) // 2], able[-1]] if able else [])
    return [
        _block(
            number, [(run, own.blocks[number]) for run, own in members], attention, f"{prefix}-words-{number}"
        )
        for number in chosen
        if attention.words is None or attention.words
    ]


def _block(
    number: int, members: Sequence[tuple[Run, BlockAttention]], attention: Attention, name: str
) -> WordBlock:
    block = members[0][1]
    text = block.text
    assert text is not None
    words = numbered(text.teacher) if attention.words is None else attention.words
    teacher = word_maps(text.teacher, words)
    shown = most_attended(words, teacher.mean(axis=(1, 2)), attention.prompt or "")
    words = [words[i] for i in shown]
    kinds = [("teacher", teacher[shown]), ("squeezed", word_maps(text.squeezed, words))]
    kinds += [(run.name, word_maps(own.text.student, words)) for run, own in members if own.text]
    pixels = [
        [map_pixels(maps[i], _brightest([each[i] for _, each in kinds])) for _, maps in kinds]
        for i in range(len(words))
    ]
    several = len({word.encoder for word in words}) > 1
    views = [
        WordView(
            word.text,
            word.encoder if several else None,
            [
                WordMap(kind, data_uri(picture), f"{significant(100 * maps[i].mean())} %")
                for (kind, maps), picture in zip(kinds, pixels[i], strict=True)
            ],
        )
        for i, word in enumerate(words)
    ]
    columns = [
        (kind, mosaic([[enlarge(own[i], 64)] for own in pixels], gap=6)) for i, (kind, _) in enumerate(kinds)
    ]
    description = f"Attention of each patch to the words, in {block.name}"
    plot = picture_plot(name, description, columns, width=1.1, rows=[word.text for word in words])
    return WordBlock(number, block.name, views, len(teacher) - len(shown), plot)


def numbered(text: Array) -> list[Word]:
    """The keys of a text that are attended to (keys, rows, columns), where it is not known which word they are."""
    attended = np.flatnonzero(text.max(axis=(1, 2)) > 0).tolist()
    return [Word(text=f"token {key + 1}", encoder="", keys=[key]) for key in attended]


def word_maps(text: Array, words: Sequence[Word]) -> Array:
    """What patches attend to of each word, (words, rows, columns), from that of each key."""
    return np.stack([text[word.keys].sum(axis=0) for word in words])


def most_attended(words: Sequence[Word], attention: Array, prompt: str) -> list[int]:
    """At most `MAX_WORDS` places of words in their order: those of the prompt first, then of its template.

    Args:
        attention: that each word gets; the most attended are taken.
    """
    own = prompt.casefold()
    ranked = sorted(
        range(len(words)), key=lambda place: (words[place].text.casefold() not in own, -attention[place])
    )
    return sorted(ranked[:MAX_WORDS])


def _brightest(maps: Sequence[Array]) -> float:
    """What is darkest in all maps of a word."""
    return float(np.quantile(np.concatenate([each.ravel() for each in maps]), 0.995)) or 1.0
