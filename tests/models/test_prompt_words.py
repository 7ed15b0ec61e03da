"""Which text key is which word, against what the models do when one token's embedding changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE
from torch import Tensor

from shd_diffusion.attention import AttentionCapture, AttentionRecord, attention_blocks
from shd_diffusion.attention.blocks import text_keys
from shd_diffusion.models.denoiser import pad, predict
from shd_diffusion.models.prompt_words import Word, group_tokens, marks_of, prompt_words
from shd_diffusion.models.prompts import PromptEncoder, denoiser_name

PROMPT = "a red fox"
JOINED_BEFORE_THE_FIRST_BLOCK = ("lumina2", "z-image")
PACKED = ("FluxTransformer", "Chroma", "Ovis", "Qwen")


def spelled(words: list[Word]) -> list[tuple[str, list[int]]]:
    return [(word.text, word.keys) for word in words]


def records_of(model, condition: dict[str, Tensor]) -> dict[str, AttentionRecord]:
    kind = type(model).__name__
    channels = model.config.in_channels // (4 if kind.startswith(PACKED) else 1)
    frames = (1,) if kind.startswith("Wan") else ()
    noised = torch.randn(1, channels, *frames, 8, 8, generator=torch.manual_seed(0))
    blocks = [name for name, block in attention_blocks(model).items() if block.capturable]
    with AttentionCapture(model, blocks) as capture, torch.no_grad():
        predict(model, noised, torch.full((1,), 500.0), condition)
        return dict(capture.records)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_keys_of_a_word_are_those_that_follow_from_its_tokens(name: str, tmp_path: Path) -> None:
    pipeline, arguments = PIPELINES[name](), ARGUMENTS.get(name, {})
    pipeline.save_pretrained(tmp_path)
    words = prompt_words(str(tmp_path), PROMPT, SIZE, arguments)
    argument = next(iter(words))
    word = next(word for word in reversed(words[argument]) if word.text in ("fox", "x"))  # some spell

    model = getattr(pipeline, denoiser_name(pipeline))
    condition = pad(PromptEncoder(pipeline, SIZE, arguments).encode([PROMPT]))
    changed = {**condition, argument: condition[argument].clone()}
    changed[argument][0, word.keys] += 1
    before, after = records_of(model, condition), records_of(model, changed)
    told: dict[str, range] = {
        key: text for key, record in before.items() if (text := text_keys(model, record))
    }
    if name in JOINED_BEFORE_THE_FIRST_BLOCK:
        assert told == {}
        return
    block = next(iter(told))  # in later ones the words have mixed
    differ = (before[block].key - after[block].key).abs().amax((0, 1, 3)) > 1e-4
    assert [told[block].start + key for key in word.keys] == differ.nonzero()[:, 0].tolist()
    assert len(told[block]) == sum(condition[each].shape[1] for each in words)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sd1.5", {"encoder_hidden_states": [
            ("<|startoftext|>", [0]), ("a", [1]), ("red", [2, 3, 4]), ("fox", [5, 6, 7]), ("<|endoftext|>", [8])]}),
        ("sd3", {"encoder_hidden_states": [
            ("<|startoftext|>", [0]), ("a", [1]), ("red", [2, 3, 4]), ("fox", [5, 6, 7]), ("<|endoftext|>", [8]),
            ("a", [12, 13]), ("red", [14, 15, 16, 17]), ("fox", [18, 19, 20, 21]), ("</s>", [22])]}),
        ("hunyuan-dit", {
            "encoder_hidden_states": [
                ("[CLS]", [0]), ("a", [1]), ("red", [2, 3, 4]), ("fox", [5, 6, 7]), ("[SEP]", [8])],
            "encoder_hidden_states_t5": [
                ("a", [0, 1]), ("red", [2, 3, 4, 5]), ("fox", [6, 7, 8, 9]), ("</s>", [10])]}),
    ],
)  # fmt: skip
def test_words_are_those_of_each_encoder_without_padding(
    name: str, expected: dict[str, list[tuple[str, list[int]]]], tmp_path: Path
) -> None:
    """The tokenizers spell; T5's begins each word with a token of its own."""
    PIPELINES[name]().save_pretrained(tmp_path)
    found = prompt_words(str(tmp_path), PROMPT, SIZE, ARGUMENTS.get(name, {}))
    assert {argument: spelled(words) for argument, words in found.items()} == expected
    encoders = list(dict.fromkeys(word.encoder for words in found.values() for word in words))
    assert encoders == {
        "sd1.5": ["text_encoder"], "sd3": ["text_encoder", "text_encoder_3"],
        "hunyuan-dit": ["text_encoder", "text_encoder_2"],
    }[name]  # fmt: skip


def test_a_prompt_that_is_cut_off_has_the_words_that_are_left(tmp_path: Path) -> None:
    PIPELINES["sd1.5"]().save_pretrained(tmp_path)
    found = prompt_words(str(tmp_path), "a red fox jumps far", SIZE)["encoder_hidden_states"]
    assert [word.text for word in found] == ["<|startoftext|>", "a", "red", "fox", "jum", "<|endoftext|>"]


def test_no_weights_are_read(tmp_path: Path) -> None:
    PIPELINES["flux-dev"]().save_pretrained(tmp_path)
    for weights in tmp_path.glob("*/*.safetensors"):
        weights.write_bytes(b"")
    words = prompt_words(str(tmp_path), PROMPT, SIZE, ARGUMENTS["flux-dev"])
    assert [word.text for word in words["encoder_hidden_states"]] == ["a", "red", "fox", "</s>"]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("<s> red</w> fo xes</w> ,</w>", ["<s>", "red</w>", "fo xes</w>", ",</w>"]),
        ("▁a ▁fox es , ▁ big ▁狐 狸", ["▁a", "▁fox es", ",", "▁ big", "▁狐", "狸"]),
        ("a Ġfox es . Ġ ð Ł", ["a", "Ġfox es", ".", "Ġ ð Ł"]),
        ("fox ##es , cat", ["fox ##es", ",", "cat"]),
        ("f o x", ["f", "o", "x"]),
    ],
)
def test_tokens_make_words_by_the_marks_of_their_vocabulary(tokens: str, words: list[str]) -> None:
    names = tokens.split()
    alone = [name == "<s>" for name in names]
    found = group_tokens(names, alone, marks_of(names))
    assert [" ".join(names[place] for place in word) for word in found] == words
