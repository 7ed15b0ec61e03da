"""Which modules of a model attend, and what is known of them without a forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import is_xformers_available
from torch import Tensor, nn

from shd_diffusion.attention.records import Kind

LINEAR = "linear attention has no softmax, hence no map"

# Suffixes of the records of one module. An image-to-video block attends once to the text, once to the image.
MAIN, CONTEXT, IMAGE = "", ":context", ":image"

# Processors that join two streams in one sequence: which rows come first.
_JOINED = {
    "JointAttnProcessor2_0": (MAIN, CONTEXT),
    "FusedJointAttnProcessor2_0": (MAIN, CONTEXT),
    "XFormersJointAttnProcessor": (MAIN, CONTEXT),
    "AuraFlowAttnProcessor2_0": (CONTEXT, MAIN),
    "FusedAuraFlowAttnProcessor2_0": (CONTEXT, MAIN),
    "FluxAttnProcessor": (CONTEXT, MAIN),
    "Flux2AttnProcessor": (CONTEXT, MAIN),
    "QwenDoubleStreamAttnProcessor2_0": (CONTEXT, MAIN),
    "CogView4AttnProcessor": (CONTEXT, MAIN),
}
_JOINED_BY_ONE_PROJECTION = ("CogView4AttnProcessor",)

# Processors that multiply out the maps themselves, and the one of the same function that calls a kernel.
_KERNEL_INSTEAD = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "AttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "SlicedAttnAddedKVProcessor": "AttnAddedKVProcessor2_0",
    "CustomDiffusionAttnProcessor": "CustomDiffusionAttnProcessor2_0",
    "IPAdapterAttnProcessor": "IPAdapterAttnProcessor2_0",
}


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
    """The attention blocks of a model by module path, in order of depth; runs nothing.

    Every module with diffusers' attention interface (`set_processor`) counts.
    """
    found = {name: module for name, module in model.named_modules() if hasattr(module, "set_processor")}
    ordered = sorted(found.items(), key=lambda item: _unet_stage(item[0]))
    return {name: _describe(model, name, module) for name, module in ordered}


def streams(module: nn.Module) -> tuple[str, ...]:
    """Suffixes of the records that share the query rows of one kernel call, in the order of the rows."""
    name = processor_name(module)
    two_streams = _present(module, "add_q_proj") or name in _JOINED_BY_ONE_PROJECTION
    return _JOINED.get(name, (MAIN,)) if two_streams else (MAIN,)


def passes(module: nn.Module) -> tuple[str, ...]:
    """Suffixes of the records of a module's kernel calls, in the order of the calls."""
    return (IMAGE, MAIN) if _attends_to_an_image_too(module) else (MAIN,)


def output_weight(model: nn.Module, name: str, stream: str = MAIN) -> Tensor | None:
    """Weight (C, H·d) of the projection behind the heads; None where the stream ends in the block."""
    module: Any = model.get_submodule(name)
    projection: Any = getattr(module, "to_out", None)
    if stream == CONTEXT and processor_name(module) not in _JOINED_BY_ONE_PROJECTION:
        projection = getattr(module, "to_add_out", None)
        return None if projection is None else projection.weight
    if projection is None:  # Flux's single blocks project attention and MLP at once, behind the module
        projection = getattr(model.get_submodule(name.rpartition(".")[0]), "proj_out", None)
    weight = projection.weight if isinstance(projection, nn.Linear) else projection[0].weight
    return weight[:, : module.inner_dim] if weight.shape[1] > module.inner_dim else weight


def processor_name(module: nn.Module) -> str:
    return type(getattr(module, "processor", None)).__name__


def _describe(model: nn.Module, name: str, module: Any) -> AttentionBlock:
    try:
        heads = module.heads
        head_dim = module.inner_dim // heads
        output_weight(model, name)
    except (AttributeError, TypeError):
        return AttentionBlock(name, "self", 0, 0, 0, f"{type(module).__name__} is of an unknown layout")
    key_value_heads = getattr(module, "inner_kv_dim", module.inner_dim) // head_dim
    return AttentionBlock(name, _kind(module), heads, key_value_heads, head_dim, _reason(module))


def _kind(module: Any) -> Kind:
    if streams(module) != (MAIN,) or _present(module, "add_q_proj") or hasattr(module, "txt_kv_proj"):
        return "joint"
    if _present(module, "add_k_proj") and not _attends_to_an_image_too(module):
        return "cross" if module.only_cross_attention else "joint"
    return "cross" if getattr(module, "is_cross_attention", False) else "self"


def _reason(module: nn.Module) -> str | None:
    name = processor_name(module)
    if "Linear" in name or "Multiscale" in name:
        return LINEAR
    if name in _KERNEL_INSTEAD:
        return f"{name} calls no attention kernel; call set_processor({_KERNEL_INSTEAD[name]}()) on it"
    if name.startswith("XFormers") and not is_xformers_available():
        return f"{name} needs xformers; pip install 'shd-diffusion[xformers]'"
    if _present(module, "add_q_proj") and name not in _JOINED:
        return f"{name} joins image and text in an order not known here"
    return None


def _attends_to_an_image_too(module: Any) -> bool:
    """Wan's image-to-video cross-attention; diffusers' older `Attention` joins such keys to its own."""
    added_keys = _present(module, "add_k_proj") and not _present(module, "add_q_proj")
    return added_keys and not hasattr(module, "only_cross_attention")


def _present(module: nn.Module, name: str) -> bool:
    return getattr(module, name, None) is not None


def _unet_stage(name: str) -> int:
    """A UNet runs down, mid, up, but registers its middle last; everything else runs as registered."""
    stages = ("down_block", "mid_block", "up_block")
    return next((stage for stage, prefix in enumerate(stages) if name.startswith(prefix)), 0)
