"""Which channels of a UNet belong together: every stage has a residual stream, every skip connection carries one along.

What a layer of the way up reads is the stream of the way up followed by that of a skip connection. A residual block
whose shortcut is a convolution begins a stream of its own, and so do a downsampler and an upsampler.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

Spaces: TypeAlias = dict[str, tuple[str, ...]]
"""Of layers by path the spaces along the axes of their weights, as in `widths.Table`; several follow one another."""

OWN = "own"
"""Input features that a layer's model computes for itself at its own width, such as the sinusoids of a timestep."""

_PARTS = ("resnets", "attentions", "downsamplers", "upsamplers")


def unet_spaces(model: nn.Module) -> Spaces:
    """The spaces of a `UNet2DModel` or `UNet2DConditionModel`.

    Raises:
        ValueError: it has a block, or a condition, that is put together otherwise.
    """
    unet: Any = model
    found = _embeddings(unet)
    found["conv_in"] = ("conv_in", "")
    stream, skips = "conv_in", ["conv_in"]
    for index, stage in enumerate(unet.down_blocks):
        left = _stage(stage, f"down_blocks.{index}", stream, found)
        stream, skips = left[-1], skips + left
    if unet.mid_block is not None:
        stream = _stage(unet.mid_block, "mid_block", stream, found)[-1]
    for index, stage in enumerate(unet.up_blocks):
        stream = _stage(stage, f"up_blocks.{index}", stream, found, skips)[-1]
    found |= {"conv_norm_out": (stream,), "conv_out": ("", stream)}
    return found


def _embeddings(unet: Any) -> Spaces:
    """The embedded timestep, and what is added to it."""
    if getattr(unet.config, "class_embeddings_concat", False):
        raise ValueError(
            "this UNet sets its class beside the timestep (`class_embeddings_concat`), which is not known"
        )
    found = _embedder("time_embedding", "timestep", OWN)
    own = OWN if getattr(unet.config, "class_embed_type", None) == "timestep" else ""
    for name, start in (("class_embedding", own), ("add_embedding", "")):
        embedding = getattr(unet, name, None)
        if isinstance(embedding, TimestepEmbedding):
            found |= _embedder(name, name, start)
        elif isinstance(embedding, nn.Embedding):
            found[name] = ("", "time")
        elif isinstance(embedding, nn.Linear):
            found[name] = ("time", "")
    return found


def _embedder(path: str, hidden: str, start: str) -> Spaces:
    return {f"{path}.linear_1": (hidden, start), f"{path}.linear_2": ("time", hidden)}


def _stage(
    stage: nn.Module, path: str, stream: str, found: Spaces, skips: list[str] | None = None
) -> list[str]:
    """Note the layers of a stage.

    Args:
        stream: that it is given.
        found: gets its layers.
        skips: on the way up, those of the skip connections that are left; each residual block takes the last.

    Returns:
        The streams that skip connections may take along, in their order; the last is what the stage puts out.
    """
    for name, child in stage.named_children():
        if name not in _PARTS and next(child.parameters(), None) is not None:
            raise ValueError(f"`{path}` is of class {type(stage).__name__}, whose channels are not known")
    parts = {name: list(getattr(stage, name, None) or ()) for name in _PARTS}
    resnets, attentions = parts["resnets"], parts["attentions"]
    without = (
        len(resnets) - len(attentions) if attentions else len(resnets)
    )  # 1 at the start of a middle block
    left = []
    for index, resnet in enumerate(resnets):
        reads = stream if skips is None else f"{stream} {skips.pop()}"
        stream = _resnet(resnet, f"{path}.resnets.{index}", stream, reads, found)
        if index >= without and attentions[index - without] is not None:
            _attention(attentions[index - without], f"{path}.attentions.{index - without}", stream, found)
        left.append(stream)
    for name in ("downsamplers", "upsamplers"):
        for index, sampler in enumerate(parts[name]):
            stream = _sampler(sampler, f"{path}.{name}.{index}", stream, found)
            left.append(stream)
    return left


def _resnet(resnet: Any, path: str, stream: str, reads: str, found: Spaces) -> str:
    if type(resnet) is not ResnetBlock2D or (resnet.conv_shortcut is None and reads != stream):
        raise ValueError(f"`{path}` is of class {type(resnet).__name__}, whose channels are not known")
    inner, out = f"{path}.inner", stream if resnet.conv_shortcut is None else path
    found |= {
        f"{path}.norm1": (reads,),
        f"{path}.conv1": (inner, reads),
        f"{path}.time_emb_proj": (f"{inner}+", "time"),
        f"{path}.norm2": (inner,),
        f"{path}.conv2": (out, inner),
        f"{path}.conv_shortcut": (out, reads),
    }
    return out


def _sampler(sampler: nn.Module, path: str, stream: str, found: Spaces) -> str:
    """Where it has a convolution it puts out a stream of its own."""
    if not isinstance(sampler, Downsample2D | Upsample2D):
        raise ValueError(f"`{path}` is of class {type(sampler).__name__}, whose channels are not known")
    layers = [name for name, child in sampler.named_children() if isinstance(child, nn.Conv2d)]
    found |= {f"{path}.{name}": (path, stream) for name in layers}
    return path if layers else stream


def _attention(module: nn.Module, path: str, stream: str, found: Spaces) -> None:
    if isinstance(module, Attention) and not module.is_cross_attention:  # of pixels, no transformer around it
        found[f"{path}.group_norm"] = (stream,)
        _heads(module, path, stream, found)
        return
    if not isinstance(module, Transformer2DModel):
        raise ValueError(f"`{path}` is of class {type(module).__name__}, whose channels are not known")
    tokens = f"{path}.tokens"
    found |= {
        f"{path}.norm": (stream,),
        f"{path}.proj_in": (tokens, stream),
        f"{path}.proj_out": (stream, tokens),
    }
    blocks: Any = module.transformer_blocks
    for index, block in enumerate(blocks):
        assert isinstance(block, BasicTransformerBlock)
        own = f"{path}.transformer_blocks.{index}"
        found |= {f"{own}.{norm}": (tokens,) for norm in ("norm1", "norm2", "norm3")}
        for name in ("attn1", "attn2"):
            if getattr(block, name) is not None:
                _heads(getattr(block, name), f"{own}.{name}", tokens, found)
        found |= {f"{own}.ff.net.0.proj": ("", tokens), f"{own}.ff.net.2": (tokens, "")}


def _heads(attention: Any, path: str, stream: str, found: Spaces) -> None:
    """Text has the width that its encoder gives it, which is no space."""
    reads = "" if attention.is_cross_attention else stream
    found |= {
        f"{path}.to_q": ("", stream),
        f"{path}.to_k": ("", reads),
        f"{path}.to_v": ("", reads),
        f"{path}.to_out.0": (stream, ""),
    }
