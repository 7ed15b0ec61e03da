"""The words that patches attend to: which are shown, and that their maps are the models'."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from shd_diffusion.errors import UserError
from shd_diffusion.reporting.attention import attention_views
from shd_diffusion.reporting.attention_words import (
    MAX_WORDS,
    WordBlock,
    most_attended,
    numbered,
    word_blocks,
    word_maps,
)
from shd_diffusion.reporting.maps import map_pixels
from shd_diffusion.reporting.page import run_styles
from shd_diffusion.reporting.runs import Attention, Run, Word, read_runs

from .made_up_text_runs import TEXT, WORDS, make_text_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("text")
    return [make_text_run(root / name, noise) for name, noise in (("kd", 0.3), ("kd-shd", 0.1))]


def attention_of(folder: Path) -> tuple[Run, Attention]:
    (run,) = read_runs([folder])
    assert run.attention
    return run, run.attention


def described(folder: Path, **changes: Any) -> None:
    """Change what attention.safetensors says of its maps."""
    path = folder / "attention.safetensors"
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        description = json.loads(file.metadata()["description"]) | changes
    save_file(tensors, path, metadata={"description": json.dumps(description)})


def test_a_words_map_is_the_sum_over_its_tokens() -> None:
    text = np.random.default_rng(0).random((5, 2, 3))
    words = [Word(text="fox", encoder="", keys=[0, 2]), Word(text="a", encoder="", keys=[4])]
    np.testing.assert_allclose(word_maps(text, words), [text[0] + text[2], text[4]], rtol=1e-12)


def test_every_word_has_a_map_of_teacher_squeezed_heads_and_each_student(folders: list[Path]) -> None:
    members = [attention_of(folder) for folder in folders]
    blocks = word_blocks(members, "attention")
    assert [(block.number, block.name, block.left_out) for block in blocks] == [
        (1, "a.attn2", 0),
        (2, "b.attn", 0),
    ]
    block = blocks[1]  # joint attention: the text is behind the image
    assert [word.text for word in block.words] == WORDS
    assert {word.encoder for word in block.words} == {None}
    assert [each.kind for each in block.words[0].maps] == ["teacher", "squeezed", "kd", "kd-shd"]
    tensors = load_file(folders[1] / "attention.safetensors")
    maps = [tensors[f"b.attn/{part}_text"][3] for part in ("teacher", "squeezed")]
    disc = block.words[3]
    assert disc.maps[0].share == f"{100 * maps[0].mean():#.3g} %"
    of_kd = load_file(folders[0] / "attention.safetensors")["b.attn/student_text"][3]
    of_shd = tensors["b.attn/student_text"][3]
    brightest = float(np.quantile(np.concatenate([*maps, of_kd, of_shd]), 0.995))
    for shown, expected in zip(disc.maps, [*maps, of_kd, of_shd], strict=True):
        content = base64.b64decode(shown.uri.removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(content)) as image:
            found = np.asarray(image.convert("RGB"))
        wanted = map_pixels(expected, brightest)
        assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 8  # one step of 256 colours


def test_the_first_the_middle_and_the_last_block_are_shown(folders: list[Path]) -> None:
    run, attention = attention_of(folders[0])
    cross = attention.blocks[1]
    many = Attention(
        attention.image, None, None, [attention.blocks[0], *[cross] * 8], attention.prompt, attention.words
    )
    assert [block.number for block in word_blocks([(run, many)], "x")] == [1, 5, 8]
    none = Attention(attention.image, 3, None, [attention.blocks[0]])
    assert word_blocks([(run, none)], "x") == []


def test_tokens_are_numbered_where_their_words_are_not_known(folders: list[Path], tmp_path: Path) -> None:
    run, attention = attention_of(folders[0])
    text = attention.blocks[1].text
    assert text and [word.text for word in numbered(text.teacher)] == [
        f"token {n}" for n in range(1, TEXT - 1)
    ]  # no padding
    unknown = Attention(attention.image, None, None, attention.blocks)
    blocks: list[WordBlock] = word_blocks([(run, unknown)], "x")
    assert [word.text for word in blocks[1].words][:2] == ["token 1", "token 2"]


def test_words_of_the_prompt_come_before_those_of_its_template() -> None:
    words = [Word(text=text, encoder="", keys=[0]) for text in ["You", "draw", "Red", "fox", "."]]
    attention = np.array([9, 8, 1, 2, 7.0])
    assert most_attended(words, attention, "a red fox") == [0, 1, 2, 3, 4]
    many = [*words, *[Word(text=f"w{i}", encoder="", keys=[0]) for i in range(20)]]
    found = most_attended(many, np.array([*attention, *np.linspace(6, 0, 20)]), "a red fox")
    assert len(found) == MAX_WORDS and found == sorted(found)
    assert {2, 3, 0, 1, 4} < set(found) and set(found) - {0, 1, 2, 3, 4} == set(range(5, 16))


def test_words_of_two_encoders_are_told_apart(folders: list[Path]) -> None:
    run, attention = attention_of(folders[0])
    words = [
        Word(text="a", encoder="text_encoder", keys=[1]),
        Word(text="a", encoder="text_encoder_3", keys=[2]),
    ]
    both = Attention(attention.image, None, None, attention.blocks, "a", words)
    block = word_blocks([(run, both)], "x")[0]
    assert [(word.text, word.encoder) for word in block.words] == [
        ("a", "text_encoder"),
        ("a", "text_encoder_3"),
    ]


def test_figures_of_words_are_beside_the_page(folders: list[Path]) -> None:
    runs = read_runs(folders)
    (view,) = attention_views(runs, run_styles(runs))
    names = [plot.name for plot in view.plots if "words" in plot.name]
    assert names == ["attention-words-1", "attention-words-2"]


@pytest.mark.parametrize(
    "change",
    [
        {"words": [{"text": "a", "encoder": "e", "keys": [TEXT]}]},
        {"words": [{"text": "a", "encoder": "e", "keys": [-1]}]},
        {"words": [{"text": "a", "encoder": "e", "keys": []}]},
        {"words": [{"text": "a"}]},
        {"words": "a"},
    ],
)
def test_words_that_are_not_in_the_maps_are_damage(change: dict[str, Any], tmp_path: Path) -> None:
    run = make_text_run(tmp_path / "kd", 0.1, images=1)
    described(run, **change)
    with pytest.raises(UserError, match=r"attention\.safetensors: damaged .*; delete it") as caught:
        read_runs([run])
    assert "\n" not in str(caught.value)


def test_a_text_that_lacks_a_tensor_is_damage(tmp_path: Path) -> None:
    path = make_text_run(tmp_path / "kd", 0.1, images=1) / "attention.safetensors"
    tensors = load_file(path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    del tensors["a.attn2/student_text"]
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=r"attention\.safetensors: damaged .*student_text"):
        read_runs([path.parent])
