"""Which stream of tokens each query row of an attention module comes from: asked of its processor.

A processor is run once with marked tokens and stand-ins for the module's layers. Image tokens are NaN, text
tokens 0. A query row depends on its own token alone, so rows that are NaN at the kernel are the image's. Stand-ins
compute nothing: neither weights nor their device, sharding or quantisation matter.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn

from shd_diffusion.attention.kernels import Note, watch

# Suffixes of the records of one module: its main stream, and the text that some modules attend from as well.
MAIN, CONTEXT = "", ":context"
Streams = tuple[str, ...]

_TOKENS = {MAIN: 2, CONTEXT: 3}
# Most processors run without rotary embedding and mask; some want a mask of the text, or (cos, sin) of one stream
# or of both.
_TEXT_MASK = torch.ones(1, _TOKENS[CONTEXT], dtype=torch.bool, device="cpu")
_TRIALS: tuple[tuple[Tensor | None, Tensor | None], ...] = (
    (None, None),
    (None, _TEXT_MASK),
    (torch.ones(2, 1, device="cpu"), None),
    (torch.ones(4, 1, device="cpu"), None),
)
_OF_CONTEXT = ("encoder_hidden_states", "gen_seq")  # what processors call their second stream
_found: dict[tuple[type, type, bool], tuple[Streams, ...]] = {}


def probe(module: Any) -> tuple[Streams, ...]:
    """For each kernel call of the module's processor: the streams that its query rows are of, in their order.

    Raises:
        Exception: whatever the processor raises that cannot be run so.
        ValueError: it calls no kernel, or mixes the streams otherwise than one after the other.
    """
    own = (type(module), type(module.processor), getattr(module, "add_q_proj", None) is None)
    if own not in _found:
        _found[own] = _run(module)
    return _found[own]


def _run(module: Any) -> tuple[Streams, ...]:
    processor = copy.copy(module.processor)
    if getattr(processor, "_attention_backend", None) is not None:
        processor._attention_backend = None
    first: Exception | None = None
    for rotary, mask in _TRIALS:
        try:
            notes = _notes(module, processor, rotary, mask)
        except Exception as error:
            first = first or error
        else:
            return tuple(_streams(read(*args, **kwargs).query) for read, args, kwargs in notes)
    assert first is not None
    raise first


def _notes(module: Any, processor: Any, rotary: Tensor | None, mask: Tensor | None) -> list[Note]:
    stub, notes = _Stub(module), list[Note]()
    arguments = _arguments(module, processor, rotary, mask)
    try:
        with torch.no_grad(), torch.device("cpu"), attention_backend("native"), watch(stub, notes.append):  # type: ignore[arg-type]
            processor(stub, **arguments)
    except Exception:
        if not notes:
            raise
    if not notes:
        raise ValueError("it calls no attention kernel")
    return notes


def _arguments(module: Any, processor: Any, rotary: Tensor | None, mask: Tensor | None) -> dict[str, Any]:
    """Marked tokens for the processor's streams; None for what else it needs."""
    width = _width(module, ("to_q", "to_qkv", "img_attn_qkv"))
    context = _width(module, ("add_q_proj", "add_k_proj", "to_added_qkv", "txt_attn_qkv")) or width
    arguments: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(processor.__call__).parameters.items())[1:]:
        if not arguments:
            arguments[name] = torch.full((1, _TOKENS[MAIN], width), torch.nan, device="cpu")
        elif name in _OF_CONTEXT:
            arguments[name] = torch.zeros(1, _TOKENS[CONTEXT], context, device="cpu")
        elif name == "attention_mask" and mask is not None:
            arguments[name] = mask
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            arguments[name] = rotary if "rotary" in name else None
    return arguments


def _width(module: Any, names: tuple[str, ...]) -> int:
    layers: list[Any] = [getattr(module, name, None) for name in names]
    return next((layer.in_features for layer in layers if hasattr(layer, "in_features")), 0)


def _streams(query: Tensor) -> Streams:
    marked = query[0, 0].isnan().any(dim=-1).tolist()  # (Q,)
    for streams in ((MAIN,), (CONTEXT,), (MAIN, CONTEXT), (CONTEXT, MAIN)):
        if marked == [stream == MAIN for stream in streams for _ in range(_TOKENS[stream])]:
            return streams
    raise ValueError(f"its {len(marked)} query rows are not one stream after the other")


class _Stub:
    """The attention module with stand-ins for its layers."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _stand_in(value) if isinstance(value, nn.Module) else value


def _stand_in(layer: nn.Module) -> Any:
    if isinstance(layer, (nn.ModuleList, nn.Sequential)):
        return [_stand_in(inner) for inner in layer]
    width = getattr(layer, "out_features", None)

    def run(x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x if width is None else x[..., :1].expand(*x.shape[:-1], width)

    return run
