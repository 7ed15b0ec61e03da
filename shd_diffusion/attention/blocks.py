"""Which modules of a model attend, and what is known of them without a forward pass."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from diffusers.utils import is_xformers_available
from torch import Tensor, nn

from shd_diffusion.attention.probe import CONTEXT, MAIN, Streams, probe
from shd_diffusion.attention.records import AttentionRecord, Kind

LINEAR = "linear attention has no softmax, hence no map"

# Suffixes of the records of a module that attends twice: an image-to-video block to the text and to the image.
IMAGE = ":image"

# Processors that multiply out the maps themselves, and the one of the same function that calls a kernel.
_KERNEL_INSTEAD = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
}
# Those that have weights of their own, which no other processor has, or attend to images beside the text.
_NO_KERNEL = ("CustomDiffusionAttnProcessor", "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0")


@dataclass(frozen=True, slots=True)
class AttentionBlock:
    """One attention module of a model, as it stands.

    Attributes:
        name: module path inside the model, e.g. `transformer_blocks.3.attn1`.
        kind: `self`, `cross`, or `joint`.
        heads: number of query heads H, hence of maps.
        key_value_heads: number of key and value heads; fewer than H where queries share them in groups.
        head_dim: width d of a head.
        reason: why it cannot be captured, with the remedy if there is one; None where it can.
    """

    name: str
    kind: Kind
    heads: int
    key_value_heads: int
    head_dim: int
    reason: str | None = None

    @property
    def capturable(self) -> bool:
        return self.reason is None


def attention_blocks(model: nn.Module) -> dict[str, AttentionBlock]:
    """The attention blocks of a model by module path, in order of depth; runs no layer.

    Every module with diffusers' attention interface (`processor`) counts.
    """
    found = {name: module for name, module in model.named_modules() if _attends(module)}
    ordered = sorted(found.items(), key=lambda item: _unet_stage(item[0]))
    return {name: _describe(model, name, module) for name, module in ordered}


def kernel_calls(module: Any) -> tuple[tuple[str, Streams], ...]:
    """A module's kernel calls: the suffix of its records, and the streams that share its query rows in order."""
    if _attends_to_an_image_too(module):
        calls: tuple[tuple[str, Streams], ...] = ((IMAGE, (MAIN,)), (MAIN, (MAIN,)))
        apart = "encoder_hidden_states_image" in inspect.signature(module.processor.__call__).parameters
        # WanAnimate2, which is given both apart, attends to the text first
        return calls[::-1] if apart else calls
    try:
        return tuple(("", streams) for streams in probe(module))
    except Exception:
        if _two_queries(module):
            raise
        return (("", (MAIN,)),)


def text_keys(model: nn.Module, record: AttentionRecord) -> range | None:
    """Which keys of a record are text, where its query rows are the image's; None where that cannot be told.

    They cannot in models that join both before their first layer, where all attention is self-attention.
    """
    queries, keys = record.query.shape[2], record.key.shape[2]
    if ":" in record.name or record.kind == "self":
        return None
    if record.kind == "cross":
        return range(keys)
    text = record.other_keys or slice(0, keys - queries)  # keys alone are added before the image's own
    registers = getattr(model, "register_tokens", None)  # AuraFlow's, learned, stand before the text
    return range(text.start if registers is None else registers.shape[1], text.stop)


def output_weight(model: nn.Module, name: str, stream: str = MAIN) -> Tensor | None:
    """Weight (C, H·d) of the projection behind the heads; None where the stream ends in the block.

    Raises:
        ValueError: the projection multiplies by something else than a weight.
    """
    module: Any = model.get_submodule(name)
    if stream == CONTEXT and _two_queries(module):
        context: Any = _first(module, "to_add_out", "txt_attn_proj")
        return None if context is None else _weight(context)
    if stream == CONTEXT and processor_name(module).startswith("EasyAnimate"):
        return None  # its single-stream blocks project the image's rows alone
    projection: Any = _first(module, "to_out", "img_attn_proj")
    parent: Any = model.get_submodule(name.rpartition(".")[0])
    if isinstance(
        projection, nn.Identity
    ):  # LuminaNextDiT adds both of a block's attentions before it projects
        projection = parent.attn2.to_out
    if projection is None:  # Flux's single blocks project attention and MLP at once, behind the module
        projection = getattr(parent, "proj_out", None)
    if isinstance(projection, (nn.ModuleList, nn.Sequential)):
        projection = projection[0]
    weight = _weight(projection)
    width = _heads(module) * _head_dim(module)
    return weight[:, :width] if weight.shape[1] > width else weight


def _weight(projection: Any) -> Tensor:
    """All that a projection multiplies by.

    Raises:
        ValueError: it is more than a weight, or no floating-point one.
    """
    if hasattr(projection, "base_layer"):
        raise ValueError(
            f"{type(projection).__name__} adds to the output projection; fuse the LoRA and unload it"
        )
    weight: Tensor = projection.weight
    if not weight.is_floating_point():
        raise ValueError(
            f"its output projection is quantised to {weight.dtype}; load the model in floating point"
        )
    return weight


def enclosing_block(attention: str) -> str:
    """Module path of the transformer block around an attention module: the innermost one that is numbered.

    `transformer_blocks.3.attn1` lies in `transformer_blocks.3`; a UNet's `mid_block.attentions.0` is its own.
    """
    parts = attention.partition(":")[0].split(".")
    while len(parts) > 1 and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def processor_name(module: nn.Module) -> str:
    return type(getattr(module, "processor", None)).__name__


def _attends(module: nn.Module) -> bool:
    return hasattr(module, "set_processor") or callable(getattr(module, "processor", None))


def _describe(model: nn.Module, name: str, module: Any) -> AttentionBlock:
    try:
        heads, head_dim = _heads(module), _head_dim(module)
        output_weight(model, name)
        output_weight(model, name, CONTEXT)
    except (AttributeError, TypeError, IndexError) as error:
        lacks = f"{type(module).__name__} is of an unknown layout: {error}"
        return AttentionBlock(name, "self", 0, 0, 0, lacks)
    except ValueError as error:
        return AttentionBlock(name, "self", 0, 0, 0, str(error))
    reason = _reason(module)
    kind: Kind = _kind(module) if reason is None else "self"
    return AttentionBlock(name, kind, heads, _key_value_heads(module, heads, head_dim), head_dim, reason)


def _heads(module: Any) -> int:
    heads: int = _first(module, "heads", "num_heads", "num_attention_heads")
    if heads is None:
        raise AttributeError("it has none of `heads`, `num_heads` and `num_attention_heads`")
    return heads


def _head_dim(module: Any) -> int:
    if (inner := _first(module, "inner_dim")) is not None:
        return int(inner // _heads(module))
    head_dim: int | None = _first(module, "head_dim", "dim_heads")
    return module.to_q.out_features // _heads(module) if head_dim is None else head_dim


def _key_value_heads(module: Any, heads: int, head_dim: int) -> int:
    if (inner := _first(module, "inner_kv_dim")) is not None:
        return int(inner // head_dim)
    return _first(module, "num_kv_heads", "kv_heads", "num_key_value_heads") or heads


def _kind(module: Any) -> Kind:
    calls = kernel_calls(module)
    if (
        any(streams != (MAIN,) for _, streams in calls)
        or _two_queries(module)
        or hasattr(module, "txt_kv_proj")
    ):
        return "joint"
    if _first(module, "add_k_proj") is not None and not _attends_to_an_image_too(module):
        return "cross" if module.only_cross_attention else "joint"
    return "cross" if getattr(module, "is_cross_attention", hasattr(module, "to_kv")) else "self"


def _reason(module: Any) -> str | None:
    name = processor_name(module)
    if "Linear" in name or "Multiscale" in name:
        return LINEAR
    if name in _KERNEL_INSTEAD:
        return f"{name} calls no attention kernel; call set_processor({_KERNEL_INSTEAD[name]}()) on it"
    if name in _NO_KERNEL:
        return f"{name} attends by weights of its own; unload the adapter"
    if name.startswith("XFormers") and not is_xformers_available():
        return f"{name} needs xformers; pip install 'shd-diffusion[xformers]'"
    if hasattr(module, "to_q_t"):  # HiDream's
        return "its text tokens have projections of a layout that is not known"
    if getattr(module, "use_differential", False):
        return "differential attention subtracts two maps, and the difference is no distribution"
    try:
        kernel_calls(module)
    except Exception as error:
        return f"{name} joins image and text in an order that a trial run does not tell: {error}"
    return None


def _two_queries(module: Any) -> bool:
    """Whether text tokens have projections of their own, up to the output's."""
    return _first(module, "add_q_proj", "to_added_qkv", "txt_attn_qkv") is not None


def _attends_to_an_image_too(module: Any) -> bool:
    """Wan's image-to-video cross-attention; diffusers' older `Attention` joins such keys to its own."""
    added_keys = _first(module, "add_k_proj") is not None and not _two_queries(module)
    return added_keys and not hasattr(module, "only_cross_attention")


def _first(module: Any, *names: str) -> Any:
    """The first of these attributes that the module has; None where it has none."""
    return next((value for n in names if (value := getattr(module, n, None)) is not None), None)


def _unet_stage(name: str) -> int:
    """A UNet runs down, mid, up, but registers its middle last; everything else runs as registered."""
    stages = ("down_block", "mid_block", "up_block")
    return next((stage for stage, prefix in enumerate(stages) if name.startswith(prefix)), 0)
