"""Which word of a prompt each text key of a denoiser stands for: asked of the pipeline itself.

The pipeline's own call is recorded with stand-ins for its text encoders, whose hidden states tell the token that each
is of. What a pipeline does with hidden states (templates cut off, encoders joined, padding set to zero) it does with
these. Nothing is computed and no weights are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from shd_diffusion.models import squeezed
from shd_diffusion.models.factory import DENOISERS
from shd_diffusion.models.prompts import PromptEncoder

TOLD = 3
"""Channels of a stand-in's hidden states that tell a token: the encoder's number from 1, the token's, and whether it is
attended to. Zeros, which pipelines pad with, are so of no encoder."""

BEGINNINGS = ("▁", "Ġ")
"""What begins a word in sentencepiece's vocabularies, and in those of bytes; both may stand alone."""
Marks = Literal["ends", "beginnings", "continuations", "nothing"]
"""What a vocabulary marks: ends of words by `</w>` (CLIP), beginnings, or continuations by `##` (BERT)."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a prompt, or a special token of its encoder.

    Attributes:
        text: as its tokenizer writes it.
        encoder: the pipeline's text encoder that it was given to.
        keys: which text keys stand for it, one a token.
    """

    text: str
    encoder: str
    keys: list[int]


@dataclass(frozen=True, slots=True)
class _Token:
    key: int
    encoder: int
    id: int


def prompt_words(
    path: str, prompt: str, size: tuple[int, int], arguments: Mapping[str, Any] | None = None
) -> dict[str, list[Word]]:
    """The words of a prompt by argument of the denoiser, in their order; padding is none of them.

    Args:
        path: the folder or hub name of a text-to-image pipeline.
        size: height and width of the images in pixels.
        arguments: further ones of the pipeline's call, see `PromptEncoder`.

    Returns:
        Only the arguments that hold a hidden state a token, (L, D); keys count from 0 to L - 1 in each.

    Raises:
        Exception: the pipeline does not run so, of whatever kind.
    """
    pipeline = _load_without_weights(path)
    encoders = [
        name for name, part in pipeline.components.items() if name.startswith("text_encoder") and part
    ]
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and name not in DENOISERS:  # which `PromptEncoder` stands in for
            number = encoders.index(name) + 1 if name in encoders else 0
            pipeline.__dict__[name] = _TokenTeller(part, number) if number else _StandIn(part)
    (condition,) = PromptEncoder(pipeline, size, arguments).encode([prompt])
    words = {}
    for name, states in condition.items():
        if tokens := _tokens_told(states, len(encoders)):
            words[name] = [
                word
                for number, own in groupby(tokens, key=lambda token: token.encoder)
                for word in _words(
                    list(own), encoders[number - 1], _tokenizer(pipeline, encoders[number - 1])
                )
            ]
    return words


def _tokens_told(states: Tensor, encoders: int) -> list[_Token]:
    """The tokens that a condition's entry tells of, without those that are not attended to; none of another entry."""
    if states.ndim != 2 or states.shape[1] < TOLD or not states.is_floating_point():
        return []
    told = states[:, :TOLD].round()
    if not torch.equal(told, states[:, :TOLD]) or not (0 <= told[:, 0].min() <= told[:, 0].max() <= encoders):
        return []
    return [
        _Token(key, number, token)
        for key, (number, token, attended) in enumerate(told.long().tolist())
        if number and attended
    ]


# --- from tokens to words -----------------------------------------------------------------------------------------


def _words(tokens: list[_Token], encoder: str, tokenizer: Any) -> list[Word]:
    """The tokens of one encoder as words."""
    tokens = _without_padding(tokens, tokenizer)
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens([token.id for token in tokens])
    stands_alone = [token.id in special for token in tokens]
    return [
        Word(_text([tokens[i].id for i in word], tokenizer), encoder, [tokens[i].key for i in word])
        for word in group_tokens(names, stands_alone, marks_of(tokenizer.get_vocab()))
    ]


def _without_padding(tokens: list[_Token], tokenizer: Any) -> list[_Token]:
    """The tokens between the padding, which encoders may attend to; CLIP's is its end of text, again and again."""
    pad, first, after = tokenizer.pad_token_id, 0, len(tokens)
    while after and tokens[after - 1].id == pad:
        after -= 1
    while first < after and tokens[first].id == pad:
        first += 1
    return tokens[first : after + (pad == tokenizer.eos_token_id)]


def marks_of(vocabulary: Iterable[str]) -> Marks:
    """How a vocabulary tells what makes a word together."""
    names = list(vocabulary)
    if any(name.endswith("</w>") for name in names):
        return "ends"
    if any(name.startswith(BEGINNINGS) for name in names):
        return "beginnings"
    return "continuations" if any(name.startswith("##") for name in names) else "nothing"


def group_tokens(names: Sequence[str], stands_alone: Sequence[bool], marks: Marks) -> list[list[int]]:
    """Which tokens make a word together: a list of places a word.

    Args:
        names: of the tokens, with the marks of their vocabulary.
        stands_alone: which of them are no part of a word.
        marks: of the vocabulary, from `marks_of`.
    """
    words: list[list[int]] = []
    for place, name in enumerate(names):
        apart = place == 0 or stands_alone[place] or stands_alone[place - 1]
        if apart or not _goes_on(name, names[place - 1], marks):
            words.append([])
        words[-1].append(place)
    return words


def _goes_on(name: str, before: str, marks: Marks) -> bool:
    """Whether a token is of the same word as the one before it."""
    if marks == "ends":
        return not before.endswith("</w>")
    if marks == "beginnings":  # a point, or a sign of Chinese, has none and is a word
        is_letter = name[:1].isalnum() and ord(name[0]) < 0x2E80 and not name.startswith(BEGINNINGS)
        return is_letter and (before[-1:].isalnum() or before in BEGINNINGS)
    return marks == "continuations" and name.startswith("##")


def _text(ids: list[int], tokenizer: Any) -> str:
    """A word as its tokenizer writes it; a token that is white space, by its name."""
    return tokenizer.decode(ids).strip() or "".join(tokenizer.convert_ids_to_tokens(ids))


def _tokenizer(pipeline: DiffusionPipeline, encoder: str) -> Any:
    """The tokenizer of a text encoder, which may stand in a processor."""
    found = getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))
    return getattr(found, "tokenizer", found)


# --- a pipeline without weights -----------------------------------------------------------------------------------


class _StandIn(nn.Module):
    """A part of a pipeline that has no weights: its config and methods, on the CPU."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.__dict__["part"] = part

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__dict__["part"], name)


class _TokenTeller(_StandIn):
    """A text encoder whose hidden states, of whatever layer, tell in their first channels what it was given."""

    def __init__(self, part: nn.Module, number: int) -> None:
        super().__init__(part)
        self.number = number

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        config = self.part.config.get_text_config()
        state = torch.zeros(*input_ids.shape, config.hidden_size)
        state[..., 0], state[..., 1] = self.number, input_ids
        state[..., 2] = 1 if attention_mask is None else attention_mask
        states = (state,) * (config.num_hidden_layers + 1)
        if type(self.part).__name__.endswith("WithProjection"):
            pooled = torch.zeros(len(state), config.projection_dim)
            return CLIPTextModelOutput(text_embeds=pooled, last_hidden_state=state, hidden_states=states)
        return BaseModelOutputWithPooling(state, torch.zeros_like(state[:, 0]), hidden_states=states)


def _load_without_weights(path: str) -> DiffusionPipeline:
    """A pipeline whose models have a config alone (meta device)."""
    index = DiffusionPipeline.load_config(path)
    given: dict[str, Any] = {}
    for name, entry in index.items():
        if not isinstance(entry, (list, tuple)):
            continue
        libraries = {"diffusers": diffusers, "transformers": transformers, squeezed.__name__: squeezed}
        kind: Any = getattr(libraries.get(entry[0]), str(entry[1]), None)
        if name == "safety_checker":
            given[name] = None
        elif _is_a(kind, ModelMixin):
            with init_empty_weights():
                given[name] = kind.from_config(kind.load_config(path, subfolder=name)).eval()
        elif _is_a(kind, transformers.PreTrainedModel):
            config = kind.config_class.from_pretrained(path, subfolder=name)
            with init_empty_weights():
                given[name] = kind(config).eval()
    if "requires_safety_checker" in index:
        given["requires_safety_checker"] = False
    return DiffusionPipeline.from_pretrained(path, **given)


def _is_a(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)
