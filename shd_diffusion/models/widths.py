"""Which axes of a model's parameters belong together: the channels of a stream, from all that write to all that read.

A *space* is a set of channels with an order of its own, such as the residual stream; what a layer reads in one space it
must read in the channels that others write there. Heads and neurons, which layouts.py knows, are none of these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from shd_diffusion.models.unet_widths import OWN, unet_spaces

STREAM = "stream"

POSITIONS = "pos_embed.pos_embed"
"""A buffer (1, N, stream), added to the stream. Where no checkpoint has it, each width has a fixed one of its own."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a tensor.

    Attributes:
        spaces: whose channels lie along it, one after the other: several times those of a stream, as the shifts,
            scales and gates of an adaptive norm do, or those of a stream and of a skip connection.
    """

    spaces: tuple[str, ...]


# Of each class the spaces along the axes of its weights (a bias goes with the first), by patterns of their paths; `+`:
# several times; a blank: one after the other. Axes in no space are left empty.
Table = dict[str, tuple[str, ...]]

_BLOCK = r"transformer_blocks\.(\d+)"


def _branch(reads: str, writes: str, space: str = STREAM) -> Table:
    """Layers that read a space, and those that write back into it what heads or neurons have made of it."""
    return {reads: ("", space), writes: (space, "")}


def _feed_forward(path: str, space: str) -> Table:
    return _branch(rf"{path}\.net\.0\.proj", rf"{path}\.net\.2", space)


def _attention(path: str) -> Table:
    return _branch(rf"{path}\.to_[qkv]", rf"{path}\.to_out\.0")


def _joint_attention(path: str, text: str) -> Table:
    """Image and text each by layers of their own."""
    return {**_attention(path), **_branch(rf"{path}\.add_[qkv]_proj", rf"{path}\.to_add_out", text)}


def _cross_attention(path: str) -> Table:
    return {**_branch(rf"{path}\.to_q", rf"{path}\.to_out\.0"), rf"{path}\.to_[kv]": ("", "context")}


def _embedder(path: str, hidden: str, out: str, start: str = "") -> Table:
    """An embedding by two linear layers."""
    return {rf"{path}\.linear_1": (hidden, start), rf"{path}\.linear_2": (out, hidden)}


_DIT: Table = {
    r"pos_embed\.proj": (STREAM,),
    **_embedder(rf"{_BLOCK}\.norm1\.emb\.timestep_embedder", r"timestep.\1", r"condition.\1"),
    rf"{_BLOCK}\.norm1\.emb\.class_embedder\.embedding_table": ("", r"condition.\1"),
    rf"{_BLOCK}\.norm1\.linear": ("stream+", r"condition.\1"),
    **_attention(rf"{_BLOCK}\.attn1"),
    **_feed_forward(rf"{_BLOCK}\.ff", STREAM),
    r"proj_out_1": ("stream+", "condition.0"),
    r"proj_out_2": ("", STREAM),
}

_PIXART: Table = {
    r"pos_embed\.proj": (STREAM,),
    # the embedded timestep is added to the last scale and shift: it lives in the stream
    **_embedder(r"adaln_single\.emb\.timestep_embedder", "timestep", STREAM),
    r"adaln_single\.linear": ("stream+", STREAM),
    **_embedder(r"caption_projection", "caption", "context"),
    **_attention(rf"{_BLOCK}\.attn1"),
    **_cross_attention(rf"{_BLOCK}\.attn2"),
    **_feed_forward(rf"{_BLOCK}\.ff", STREAM),
    rf"(?:{_BLOCK}\.)?scale_shift_table": ("", STREAM),
    r"proj_out": ("", STREAM),
}

_COGVIEW4: Table = {
    r"patch_embed\.(text_)?proj": (STREAM, ""),
    **_embedder(r"time_condition_embed\.timestep_embedder", "timestep", "condition", OWN),
    **_embedder(r"time_condition_embed\.condition_embedder", "sizes", "condition"),
    rf"{_BLOCK}\.norm1\.linear": ("stream+", "condition"),
    **_attention(rf"{_BLOCK}\.attn1"),
    **_feed_forward(rf"{_BLOCK}\.ff", STREAM),
    r"norm_out\.linear": ("stream+", "condition"),
    r"proj_out": ("", STREAM),
}

_SD3: Table = {
    r"pos_embed\.proj": (STREAM,),
    r"pos_embed\.pos_embed": ("", "", STREAM),
    **_embedder(r"time_text_embed\.timestep_embedder", "timestep", "condition"),
    **_embedder(r"time_text_embed\.text_embedder", "pooled", "condition"),
    r"context_embedder": ("context", ""),
    rf"{_BLOCK}\.norm1\.linear": ("stream+", "condition"),
    rf"{_BLOCK}\.norm1_context\.linear": ("context+", "condition"),
    **_joint_attention(rf"{_BLOCK}\.attn", "context"),
    **_attention(rf"{_BLOCK}\.attn2"),
    **_feed_forward(rf"{_BLOCK}\.ff", STREAM),
    **_feed_forward(rf"{_BLOCK}\.ff_context", "context"),
    r"norm_out\.linear": ("stream+", "condition"),
    r"proj_out": ("", STREAM),
}

_MDT_BLOCK = r"(?:(?:in|out|decoder)_blocks\.\d+|side_block)"

_MDTV2: Table = {
    r"patch_embed\.proj": (STREAM,),
    r"position_embedding|decoder_position_embedding|mask_token": ("", "", STREAM),
    **_embedder(r"timestep_embedder", "timestep", "condition"),
    r"label_embedder": ("", "condition"),
    rf"{_MDT_BLOCK}\.skip": (STREAM, "stream+"),
    rf"{_MDT_BLOCK}\.norm1\.linear": ("stream+", "condition"),
    **_attention(rf"{_MDT_BLOCK}\.attn"),
    **_feed_forward(rf"{_MDT_BLOCK}\.ff", STREAM),
    r"proj_out_1": ("stream+", "condition"),
    r"proj_out_2": ("", STREAM),
}

# In the single blocks of Flux and its kin text and image go through the same layers, one behind the other: one stream.

_SINGLE_BLOCK = r"single_transformer_blocks\.\d+"

_CHROMA: Table = {
    r"(x|context)_embedder": (STREAM, ""),
    r"distilled_guidance_layer\.out_proj": (STREAM, ""),  # shifts, scales and gates
    **_joint_attention(rf"{_BLOCK}\.attn", STREAM),
    **_feed_forward(rf"{_BLOCK}\.ff(_context)?", STREAM),
    **_branch(rf"{_SINGLE_BLOCK}\.(attn\.to_[qkv]|proj_mlp)", rf"{_SINGLE_BLOCK}\.proj_out"),
    r"proj_out": ("", STREAM),
}

_MODULATED: Table = {
    **_CHROMA,
    rf"{_BLOCK}\.norm1(_context)?\.linear|{_SINGLE_BLOCK}\.norm\.linear|norm_out\.linear": (
        "stream+",
        "condition",
    ),
}

_FLUX: Table = {
    **_MODULATED,
    **_embedder(r"time_text_embed\.timestep_embedder", "timestep", "condition"),
    **_embedder(r"time_text_embed\.guidance_embedder", "guidance", "condition"),
    **_embedder(r"time_text_embed\.text_embedder", "pooled", "condition"),
}

_OVIS: Table = {**_MODULATED, **_embedder("timestep_embedder", "timestep", "condition")}

_FLUX2: Table = {
    r"(x|context)_embedder": (STREAM, ""),
    **_embedder(r"time_guidance_embed\.timestep_embedder", "timestep", "condition"),
    **_embedder(r"time_guidance_embed\.guidance_embedder", "guidance", "condition"),
    r"(double_stream_modulation_(img|txt)|single_stream_modulation|norm_out)\.linear": (
        "stream+",
        "condition",
    ),
    **_joint_attention(rf"{_BLOCK}\.attn", STREAM),
    **_branch(rf"{_BLOCK}\.ff(_context)?\.linear_in", rf"{_BLOCK}\.ff(_context)?\.linear_out"),
    **_branch(rf"{_SINGLE_BLOCK}\.attn\.to_qkv_mlp_proj", rf"{_SINGLE_BLOCK}\.attn\.to_out"),
    r"proj_out": ("", STREAM),
}

_AURA_BLOCK = r"(joint|single)_transformer_blocks\.\d+"

_AURAFLOW: Table = {
    r"pos_embed\.proj": (STREAM, ""),
    r"pos_embed\.pos_embed|register_tokens": ("", "", STREAM),
    r"context_embedder": (STREAM, ""),
    **_embedder(r"time_step_proj", "timestep", "condition"),
    rf"{_AURA_BLOCK}\.norm1(_context)?\.linear|norm_out\.linear": ("stream+", "condition"),
    **_joint_attention(rf"{_AURA_BLOCK}\.attn", STREAM),
    **_branch(
        rf"{_AURA_BLOCK}\.ff(_context)?\.linear_[12]", rf"{_AURA_BLOCK}\.ff(_context)?\.out_projection"
    ),
    r"proj_out": ("", STREAM),
}

_QWEN: Table = {
    r"img_in": (STREAM, ""),
    r"txt_in": ("context", ""),
    **_embedder(r"time_text_embed\.timestep_embedder", "timestep", "condition"),
    rf"{_BLOCK}\.img_mod\.1|norm_out\.linear": ("stream+", "condition"),
    rf"{_BLOCK}\.txt_mod\.1": ("context+", "condition"),
    **_joint_attention(rf"{_BLOCK}\.attn", "context"),
    **_feed_forward(rf"{_BLOCK}\.img_mlp", STREAM),
    **_feed_forward(rf"{_BLOCK}\.txt_mlp", "context"),
    r"proj_out": ("", STREAM),
}

_LUMINA_BLOCK = r"(?:(?:noise|context)_refiner|layers)\.\d+"

_LUMINA2: Table = {
    r"x_embedder|time_caption_embed\.caption_embedder\.1": (STREAM, ""),
    **_embedder(r"time_caption_embed\.timestep_embedder", "timestep", "condition"),
    rf"{_LUMINA_BLOCK}\.norm1\.linear|norm_out\.linear_1": ("stream+", "condition"),
    rf"{_LUMINA_BLOCK}\.(norm1(\.norm)?|norm2|ffn_norm[12])": (STREAM,),
    **_attention(rf"{_LUMINA_BLOCK}\.attn"),
    **_branch(rf"{_LUMINA_BLOCK}\.feed_forward\.linear_[13]", rf"{_LUMINA_BLOCK}\.feed_forward\.linear_2"),
    r"norm_out\.linear_2": ("", STREAM),
}

_Z_IMAGE: Table = {
    r"all_x_embedder\.[\d-]+|cap_embedder\.1": (STREAM, ""),
    r"(x|cap)_pad_token": ("", STREAM),
    r"t_embedder\.mlp\.2": ("condition", ""),
    rf"{_LUMINA_BLOCK}\.adaLN_modulation\.0|all_final_layer\.[\d-]+\.adaLN_modulation\.1": (
        "stream+",
        "condition",
    ),
    rf"{_LUMINA_BLOCK}\.(attention|ffn)_norm[12]": (STREAM,),
    **_attention(rf"{_LUMINA_BLOCK}\.attention"),
    **_branch(rf"{_LUMINA_BLOCK}\.feed_forward\.w[13]", rf"{_LUMINA_BLOCK}\.feed_forward\.w2"),
    r"all_final_layer\.[\d-]+\.linear": ("", STREAM),
}

_HUNYUAN_DIT: Table = {
    r"pos_embed\.proj": (STREAM,),
    **_embedder(r"time_extra_emb\.timestep_embedder", "timestep", "condition"),
    **_embedder(r"time_extra_emb\.extra_embedder", "extra", "condition"),
    r"blocks\.\d+\.norm1\.linear": (STREAM, "condition"),
    r"blocks\.\d+\.(norm1\.norm|norm[23])": (STREAM,),
    **_attention(r"blocks\.\d+\.attn1"),
    **_branch(r"blocks\.\d+\.attn2\.to_q", r"blocks\.\d+\.attn2\.to_out\.0"),
    **_feed_forward(r"blocks\.\d+\.ff", STREAM),
    r"blocks\.\d+\.skip_norm": ("stream+",),
    r"blocks\.\d+\.skip_linear": (STREAM, "stream+"),
    r"norm_out\.linear": ("stream+", "condition"),
    r"proj_out": ("", STREAM),
}

_WAN_BLOCK = r"blocks\.\d+"

_WAN: Table = {
    r"patch_embedding": (STREAM,),
    # as PixArt's: the embedded timestep is added to the last scale and shift
    **_embedder(r"condition_embedder\.time_embedder", "timestep", STREAM),
    r"condition_embedder\.time_proj": ("stream+", STREAM),
    **_embedder(r"condition_embedder\.text_embedder", "caption", "context"),
    rf"(?:{_WAN_BLOCK}\.)?scale_shift_table": ("", "", STREAM),
    **_attention(rf"{_WAN_BLOCK}\.attn1"),
    **_cross_attention(rf"{_WAN_BLOCK}\.attn2"),
    rf"{_WAN_BLOCK}\.norm2": (STREAM,),
    **_feed_forward(rf"{_WAN_BLOCK}\.ffn", STREAM),
    r"proj_out": ("", STREAM),
}

WIDTHS: dict[str, Table] = {
    "DiTTransformer2DModel": _DIT,
    "PixArtTransformer2DModel": _PIXART,
    "CogView4Transformer2DModel": _COGVIEW4,
    "SD3Transformer2DModel": _SD3,
    "MDTv2Transformer2DModel": _MDTV2,
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX2,
    "ChromaTransformer2DModel": _CHROMA,
    "OvisImageTransformer2DModel": _OVIS,
    "AuraFlowTransformer2DModel": _AURAFLOW,
    "QwenImageTransformer2DModel": _QWEN,
    "Lumina2Transformer2DModel": _LUMINA2,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "HunyuanDiT2DModel": _HUNYUAN_DIT,
    "WanTransformer3DModel": _WAN,
}


_OTHERWISE = (
    "set it to `random`, or make the student by `shd-diffusion compress` and name it as `student.pretrained`"
)

UNETS = ("UNet2DModel", "UNet2DConditionModel")
"""What belongs together there depends on the sizes of its stages: see `unet_spaces`."""


def axes(model: nn.Module) -> dict[str, tuple[Axis | None, ...]]:
    """The spaces along the axes of a model's tensors, by their names in its state dict; those in none are left out.

    Raises:
        ValueError: the class has no table, or its channels are joined in a way that no table can say.
    """
    if getattr(model, "use_additional_conditions", False):
        raise ValueError(
            f"this {type(model).__name__} is told sizes (`use_additional_conditions`), whose embeddings share the "
            f"stream; {_OTHERWISE}"
        )
    spaces_of = _table(model)
    state = model.state_dict()
    found = {name: spaces for name in state if (spaces := spaces_of(name)) is not None}
    sizes = {
        space: state[name].shape[dim]
        for name, spaces in found.items()
        for dim, space in enumerate(spaces[: state[name].ndim])
        if space and not space.endswith("+") and " " not in space
    }
    return {
        name: tuple(
            _axis(space, length, sizes) for space, length in zip(spaces, state[name].shape, strict=False)
        )
        for name, spaces in found.items()
    }


def _table(model: nn.Module) -> Callable[[str], tuple[str, ...] | None]:
    """The spaces of a tensor by its name; None for one that is in none."""
    kinds = [kind.__name__ for kind in type(model).__mro__]
    if any(kind in UNETS for kind in kinds):
        return partial(_listed, unet_spaces(model))
    table = next((WIDTHS[kind] for kind in kinds if kind in WIDTHS), None)
    if table is None:
        raise ValueError(
            f"the channels of a {type(model).__name__} are not known, only those of {', '.join((*WIDTHS, *UNETS))}; "
            f"{_OTHERWISE}"
        )
    return partial(_matched, table)


def _listed(table: Table, name: str) -> tuple[str, ...] | None:
    path, _, last = name.rpartition(".")
    spaces = table.get(path)
    return spaces if spaces is None or last == "weight" else spaces[:1]


def _matched(table: Table, name: str) -> tuple[str, ...] | None:
    path, _, last = name.rpartition(".")
    for pattern, spaces in table.items():
        for whole, dims in ((name, spaces), (path, spaces if last == "weight" else spaces[:1])):
            if match := re.fullmatch(pattern, whole):
                return tuple(match.expand(space) for space in dims)
    return None


def _axis(space: str, length: int, sizes: Mapping[str, int]) -> Axis | None:
    if not space:
        return None
    if space.endswith("+"):
        plain = space.removesuffix("+")
        return Axis((plain,) * (length // sizes[plain]))
    return Axis(tuple(space.split()))


def space_sizes(model: nn.Module) -> dict[str, int]:
    """Channels of every space of a model; `axes` tells the errors."""
    state = model.state_dict()
    return {
        axis.spaces[0]: state[name].shape[dim] // len(axis.spaces)
        for name, its in axes(model).items()
        for dim, axis in enumerate(its)
        if axis is not None and len(set(axis.spaces)) == 1
    }


def fixed_positions(model: nn.Module) -> Tensor | None:
    """The position embedding (N, stream) that a model adds to its stream and that no checkpoint can change."""
    table = dict(model.named_buffers()).get(POSITIONS)
    return None if table is None or POSITIONS in model.state_dict() else table[0]
