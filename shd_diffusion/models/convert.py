"""Checkpoints as the authors of MDTv2, DiT and TAEF2 publish them, to diffusers model folders."""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from safetensors.torch import load_file
from torch import Tensor

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import replacing_folder
from shd_diffusion.models.dit import OriginalDiTTransformer2DModel
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel
from shd_diffusion.models.tiny_autoencoder import PooledAutoencoderTiny

StateDict = dict[str, Tensor]

# Heads by width of the published sizes S, B, L and XL: no shape in a DiT checkpoint tells them.
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}

# From parameter names here to the authors', applied in order. One of the authors' may serve several here: q, k, v
# are one matrix there, and diffusers' DiT keeps a copy of the timestep and label embedders in every block.
_RENAMES = (
    (r"^.*timestep_embedder\.linear_1", "t_embedder.mlp.0"),
    (r"^.*timestep_embedder\.linear_2", "t_embedder.mlp.2"),
    (r"^.*class_embedder\.embedding_table|^label_embedder", "y_embedder.embedding_table"),
    (r"^(pos|patch)_embed\.proj", "x_embedder.proj"),
    (r"^position_embedding", "pos_embed"),
    (r"^decoder_position_embedding", "decoder_pos_embed"),
    (r"^proj_out_1", "final_layer.adaLN_modulation.1"),
    (r"^proj_out_2", "final_layer.linear"),
    (r"^transformer_blocks", "blocks"),
    (r"^in_blocks", "en_inblocks"),
    (r"^out_blocks", "en_outblocks"),
    (r"^side_block", "sideblocks.0"),
    (r"^decoder_blocks", "de_blocks"),
    (r"norm1\.linear", "adaLN_modulation.1"),
    (r"position_bias\.table", "attn.rel_pos_bias.relative_position_bias_table"),
    (r"attn1?\.to_[qkv]\.", "attn.qkv."),
    (r"attn1?\.to_out\.0", "attn.proj"),
    (r"ff\.net\.0\.proj", "mlp.fc1"),
    (r"ff\.net\.2", "mlp.fc2"),
    (r"\.skip\.", ".skip_linear."),
)

# Keys whose shapes tell the sizes, with their ranks.
_TELLING = {
    "x_embedder.proj.weight": 4,
    "pos_embed": 3,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.bias": 1,
}
_BIAS_TABLE = "sideblocks.0.attn.rel_pos_bias.relative_position_bias_table"
_DERIVED = ".relative_position_index"  # a buffer that follows from the sizes


def convert_checkpoint(
    kind: Literal["mdtv2", "dit"], file: Path, output: Path, num_attention_heads: int | None = None
) -> None:
    """Write an authors' checkpoint as a diffusers model folder that computes the same function, in float32.

    All sizes follow from the shapes; the last row of the label table is the null class, as both repositories
    train it. Where a file holds a model and its average (EMA), the average is converted.

    Args:
        kind: `mdtv2` (sail-sg/MDT) or `dit` (facebookresearch/DiT).
        file: a checkpoint of torch, or safetensors with the same names.
        output: the new folder.
        num_attention_heads: only for a DiT of another width than the published ones.

    Raises:
        UserError: `output` exists, `file` cannot be read or is no such checkpoint, or keys are missing,
            unexpected or misshapen: those are listed.
    """
    _check_new(output)
    state = _read(file)
    try:
        with torch.device("meta"):
            model = _empty_model(kind, state, num_attention_heads)
        _check_keys(state, model)
        if kind == "dit":
            _check_positions(state, model)
    except ValueError as error:
        raise UserError(f"{file}: not a checkpoint of {kind}: {error}") from None
    model.load_state_dict({name: _take(state, name) for name in model.state_dict()}, assign=True)
    with replacing_folder(output) as folder:
        model.save_pretrained(folder)


def convert_taef2(folder: Path, output: Path) -> None:
    """Write TAEF2's published weights as a diffusers model folder that `prepare.vae` takes, in float32.

    Args:
        folder: holds encoder.safetensors and decoder.safetensors.
        output: the new folder.

    Raises:
        UserError: `output` exists, or a file is missing, damaged, or holds other weights.
    """
    _check_new(output)
    vae = PooledAutoencoderTiny(latent_channels=32)
    # The published decoder counts its clamping of latents as layer 0.
    for part, offset in (("encoder", 0), ("decoder", 1)):
        file = folder / f"{part}.safetensors"
        state = _read(file)
        try:
            getattr(vae, part).layers.load_state_dict(
                {_shift(name, -offset): value for name, value in state.items()}
            )
        except (RuntimeError, ValueError) as error:  # other names or shapes
            raise UserError(f"{file}: not the weights of TAEF2 ({one_line(error)})") from None
    with replacing_folder(output) as new:
        vae.save_pretrained(new)


def _check_new(output: Path) -> None:
    """Raise UserError if there is something where a model is to be written."""
    if output.exists():
        raise UserError(f"{output}: exists already; give another --to, or delete it")


def _read(file: Path) -> StateDict:
    """The state dict in a checkpoint; nothing but tensors and plain values is unpickled."""
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            # DiT's trainer saves its command line too.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give the path of a checkpoint") from None
    except pickle.UnpicklingError:
        raise UserError(f"{file}: damaged, or holds more than tensors, which is not loaded") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise UserError(f"{file}: not a readable checkpoint ({one_line(error)})") from None
    state = content.get("ema", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: holds no state dict; give a checkpoint of the authors' code")
    return state


# --- sizes, from shapes ----------------------------------------------------------------------------------


def _empty_model(kind: str, state: StateDict, heads: int | None) -> ModelMixin:
    """The model that a checkpoint is of.

    Raises:
        ValueError: the shapes do not tell its sizes.
    """
    telling = _TELLING | ({_BIAS_TABLE: 2} if kind == "mdtv2" else {})
    lacking = [key for key, rank in telling.items() if key not in state or state[key].ndim != rank]
    if lacking:
        raise ValueError(f"missing or misshapen: {', '.join(lacking)}")
    width, in_channels, patch_size = state["x_embedder.proj.weight"].shape[:3]
    heads = heads or (state[_BIAS_TABLE].shape[1] if kind == "mdtv2" else DIT_HEADS.get(width))
    if heads is None:
        raise ValueError(f"width {width} is none of the published {[*DIT_HEADS]}; give the number of heads")
    if width % heads:
        raise ValueError(f"{heads} heads do not divide its width {width}")
    arguments = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": in_channels,
        "out_channels": len(state["final_layer.linear.bias"]) // patch_size**2,
        "sample_size": math.isqrt(state["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "num_embeds_ada_norm": len(state["y_embedder.embedding_table.weight"]) - 1,
    }
    if kind == "dit":
        return OriginalDiTTransformer2DModel(**arguments, num_layers=_count(state, "blocks"), norm_eps=1e-6)
    decoder = _count(state, "de_blocks")
    encoder = 2 * max(_count(state, "en_inblocks"), _count(state, "en_outblocks"))
    return MDTv2Transformer2DModel(**arguments, num_layers=encoder + decoder, num_decoder_layers=decoder)


def _count(state: StateDict, stack: str) -> int:
    """Blocks of a stack, counted to the last so that a gap is a missing key."""
    numbers = [int(found[1]) for key in state if (found := re.match(rf"{stack}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


# --- keys ------------------------------------------------------------------------------------------------


def _source(name: str) -> str:
    """The authors' name of one of our parameters."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _take(state: StateDict, name: str) -> Tensor:
    """The value of one of our parameters: its own copy, and of a fused matrix its third."""
    value = state[_source(name)]
    third = re.search(r"\.to_([qkv])\.", name)
    if third:
        value = value.chunk(3)["qkv".index(third[1])]
    return value.detach().to(torch.float32, copy=True)


def _check_keys(state: StateDict, model: ModelMixin) -> None:
    """See that the checkpoint has exactly the model's parameters.

    Raises:
        ValueError: with all keys that are missing, unexpected or misshapen.
    """
    expected = {"pos_embed": _sincos(model).shape}  # diffusers' DiT computes it: no parameter there
    for name, (rows, *rest) in ((name, value.shape) for name, value in model.state_dict().items()):
        source = _source(name)
        expected[source] = torch.Size([3 * rows if ".qkv." in source else rows, *rest])
    findings = {
        "missing": expected.keys() - state.keys(),
        "unexpected": {key for key in state.keys() - expected.keys() if not key.endswith(_DERIVED)},
        "misshapen": {
            f"{key} {tuple(state[key].shape)} instead of {tuple(shape)}"
            for key, shape in expected.items()
            if key in state and state[key].shape != shape
        },
    }
    if any(findings.values()):
        raise ValueError("; ".join(f"{what}: {_listed(keys)}" for what, keys in findings.items() if keys))


def _check_positions(state: StateDict, model: ModelMixin) -> None:
    """See that a DiT has the positions that diffusers computes, as near as bfloat16 would keep them.

    Raises:
        ValueError: it has others.
    """
    if not torch.allclose(state["pos_embed"].double(), _sincos(model), atol=5e-3):
        raise ValueError("`pos_embed` is not the fixed sine-cosine table; diffusers' DiT has no other")


def _sincos(model: ModelMixin) -> Tensor:
    """The table of sines and cosines for the model's tokens, (1, N, C)."""
    grid = model.config.sample_size // model.config.patch_size
    width = model.config.num_attention_heads * model.config.attention_head_dim
    return get_2d_sincos_pos_embed(width, grid, base_size=grid)[None]


def _listed(keys: Collection[str]) -> str:
    first, rest = sorted(keys)[:20], len(keys) - 20
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")


def _shift(name: str, by: int) -> str:
    """The name of a parameter whose layer is so many further on."""
    index, rest = name.split(".", 1)
    return f"{int(index) + by}.{rest}"
