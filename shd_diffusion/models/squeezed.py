"""Models whose blocks have fewer heads or neurons than their class's config can say.

`Squeezed<X>` is the diffusers class X with two more entries in its config: the heads and the neurons of the blocks that
differ. It is built as X is and then cut to shape, so it is saved and loaded like any other model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_utils import LegacyModelMixin
from torch import Tensor, nn

from shd_diffusion.attention import attention_blocks
from shd_diffusion.attention.blocks import processor_name
from shd_diffusion.models import dit, mdtv2

PREFIX = "Squeezed"
# Where a module keeps its heads: rows of these layers, columns of those.
_ROWS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_COLUMNS = ("to_out", "to_add_out")


@functools.cache
def squeezed_class(kind: type[ModelMixin]) -> type[ModelMixin]:
    """`Squeezed<kind>`: `kind`, whose constructor also takes `squeezed_heads` and `squeezed_neurons`.

    Both map module paths (`transformer_blocks.0.attn1`, `transformer_blocks.0.ff`) to counts; what they leave out is as
    in `kind`.

    Raises:
        ValueError: diffusers loads such a class as another one.
    """
    if issubclass(kind, Squeezed):
        return kind
    if issubclass(kind, LegacyModelMixin):
        raise ValueError(f"diffusers loads a {kind.__name__} as another class, so it cannot be squeezed")

    def __init__(
        self: Any,
        *args: Any,
        squeezed_heads: Mapping[str, int] | None = None,
        squeezed_neurons: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        kind.__init__(self, *args, **kwargs)
        heads, neurons = dict(squeezed_heads or {}), dict(squeezed_neurons or {})
        self.register_to_config(squeezed_heads=heads, squeezed_neurons=neurons)
        for name, count in heads.items():
            cut_heads(self, name, torch.arange(count, device="cpu"))
        for name, count in neurons.items():
            cut_neurons(self.get_submodule(name), torch.arange(count, device="cpu"))

    # diffusers reads from the signature what a config may hold.
    own = list(inspect.signature(__init__).parameters.values())[2:4]
    stock = [p for p in inspect.signature(kind.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
    __init__.__signature__ = inspect.Signature([*stock, *own])  # type: ignore[attr-defined]
    body = {"__init__": __init__, "__module__": __name__, "__doc__": f"{kind.__name__}, squeezed."}
    return type(PREFIX + kind.__name__, (Squeezed, kind), body)


class Squeezed:
    """Marks the classes that `squeezed_class` makes."""


def __getattr__(name: str) -> Any:
    """`Squeezed<X>` by its name, as pipelines and pickles look for it."""
    if name.startswith(PREFIX):
        stock = name.removeprefix(PREFIX)
        for place in (diffusers, dit, mdtv2):
            found = getattr(place, stock, None)
            if isinstance(found, type) and issubclass(found, ModelMixin):
                return squeezed_class(found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def declare_shape(model: ModelMixin, stock: Mapping[str, int]) -> None:
    """Write into the config of a model whose modules were cut what distinguishes it from its class, in place.

    A model that its own class describes keeps it.

    Args:
        model: a diffusers model.
        stock: `shape` of a model of the class and config before it was cut.
    """
    differing = {name: count for name, count in shape(model).items() if count != stock[name]}
    if not differing and not isinstance(model, Squeezed):
        return
    heads = {name: count for name, count in differing.items() if hasattr(model.get_submodule(name), "heads")}
    neurons = {name: count for name, count in differing.items() if name not in heads}
    kind: Any = type(model)
    model.__class__ = squeezed_class(kind)
    earlier = [dict(getattr(model.config, key, None) or {}) for key in ("squeezed_heads", "squeezed_neurons")]
    model.register_to_config(squeezed_heads=earlier[0] | heads, squeezed_neurons=earlier[1] | neurons)


def shape(model: nn.Module) -> dict[str, int]:
    """Heads of every attention block and neurons of every feed-forward layer, by module path."""
    heads = {name: block.heads for name, block in attention_blocks(model).items()}
    return heads | {name: neurons(layer) for name, layer in feed_forwards(model).items()}


def feed_forwards(model: nn.Module) -> dict[str, FeedForward]:
    """The feed-forward layers that can be squeezed, by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FeedForward)}


def neurons(layer: FeedForward) -> int:
    """Neurons of a feed-forward layer; a gated unit is one."""
    return layer.net[2].in_features


# --- cutting ------------------------------------------------------------------------------------------------


def check_heads_can_be_cut(model: nn.Module, name: str) -> None:
    """Raise ValueError unless heads can leave the attention block of that name."""
    module: Any = model.get_submodule(name)
    # what has no `inner_dim` or no `set_processor` (Mochi's) is none of diffusers' usual layouts
    usual = hasattr(module, "inner_dim") and hasattr(module, "set_processor") and output_layers(module)
    if not usual or any(getattr(module, layer, None) is None for layer in _ROWS[:3]):
        kind = type(module).__name__
        raise ValueError(f"attention block `{name}` is a {kind} of a layout whose heads cannot be squeezed")
    if getattr(module, "fused_projections", False):
        raise ValueError(f"attention block `{name}` has fused projections; call unfuse_qkv_projections()")
    if "AddedKV" in processor_name(module):
        raise ValueError(
            f"attention block `{name}` has a processor of fixed width: its heads cannot be squeezed"
        )
    if module.to_k.out_features != module.to_q.out_features:
        raise ValueError(f"attention block `{name}` shares keys among heads, which cannot be squeezed")
    for norm in ("norm_q", "norm_k"):
        weight = getattr(getattr(module, norm, None), "weight", None)
        if weight is not None and weight.numel() > module.inner_dim // module.heads:
            raise ValueError(f"attention block `{name}` normalises over all heads at once: none can leave")


def cut_heads(model: nn.Module, name: str, kept: Tensor) -> None:
    """Leave an attention block only some of its heads, with their weights, in place.

    Args:
        model: the model around the block.
        name: module path of the block.
        kept: (N,) indices of the heads that stay, in their new order.

    Raises:
        ValueError: the block's heads cannot be cut, or it has no such heads.
    """
    check_heads_can_be_cut(model, name)
    module: Any = model.get_submodule(name)
    if not len(kept) or int(kept.max()) >= module.heads:
        raise ValueError(f"attention block `{name}` has {module.heads} heads, not those: {kept.tolist()}")
    width = module.inner_dim // module.heads
    channels = (kept[:, None] * width + torch.arange(width, device=kept.device)).flatten()
    for linear in input_layers(module).values():
        _keep_rows(linear, channels)
    for linear in output_layers(module).values():
        _keep_columns(linear, channels)
    if (bias := position_bias(model, name)) is not None:
        bias.table = _part(bias.table, kept, 1)
    module.heads, module.inner_dim = len(kept), len(channels)
    if hasattr(module, "inner_kv_dim"):
        module.inner_kv_dim = len(channels)
    if hasattr(module, "sliceable_head_dim"):
        module.sliceable_head_dim = len(kept)


def widen_heads(model: nn.Module, name: str, width: int) -> None:
    """Give the heads of an attention block more channels, all 0, in place: it computes the same function.

    Queries grow by √(new width / old width), since attention divides logits by the root of the width.

    Args:
        model: the model around the block.
        name: module path of the block.
        width: channels of a head, at least as many as it has.

    Raises:
        ValueError: its queries are normalised or rotated, so that the function would be another one.
    """
    check_heads_can_be_widened(model, name)
    module: Any = model.get_submodule(name)
    heads, before = module.heads, module.inner_dim // module.heads
    missing = width - before
    for layer, linear in input_layers(module).items():
        factor = (width / before) ** 0.5 if layer in ("to_q", "add_q_proj") else 1.0
        for key, parameter in linear.named_parameters():
            by_head = parameter.detach().unflatten(0, (heads, before)) * factor
            shape = by_head.shape[0], missing, *by_head.shape[2:]
            wider = torch.cat([by_head, by_head.new_zeros(shape)], 1).flatten(0, 1)
            setattr(linear, key, nn.Parameter(wider, requires_grad=parameter.requires_grad))
        linear.out_features = heads * width
    for linear in output_layers(module).values():
        by_head = nn.functional.pad(linear.weight.detach().unflatten(1, (heads, before)), (0, missing))
        linear.weight = nn.Parameter(by_head.flatten(1), requires_grad=linear.weight.requires_grad)
        linear.in_features = heads * width
    module.inner_dim = heads * width
    if hasattr(module, "inner_kv_dim"):
        module.inner_kv_dim = heads * width
    if hasattr(module, "scale"):
        module.scale = width**-0.5


def check_heads_can_be_widened(model: nn.Module, name: str) -> None:
    """Raise ValueError unless the heads of that block can have another width."""
    check_heads_can_be_cut(model, name)
    module: Any = model.get_submodule(name)
    rotates = any(
        "rotary" in parameter for parameter in inspect.signature(module.processor.__call__).parameters
    )
    if rotates or getattr(module, "norm_q", None) is not None or not getattr(module, "scale_qk", True):
        raise ValueError(
            f"attention block `{name}` normalises, rotates or does not scale its queries: heads of another width "
            "compute something else"
        )


def cut_neurons(layer: FeedForward, kept: Tensor) -> None:
    """Leave a feed-forward layer only some of its neurons, with their weights, in place.

    Args:
        layer: plain or gated.
        kept: (n,) indices of the neurons that stay.

    Raises:
        ValueError: it has no such neurons.
    """
    count, first = neurons(layer), layer.net[0].proj
    if not len(kept) or int(kept.max()) >= count:
        raise ValueError(f"a feed-forward layer of {count} neurons cannot keep {len(kept)} that it has not")
    parts = first.out_features // count  # 2 where gated: all values, then all gates
    _keep_rows(first, torch.cat([kept + part * count for part in range(parts)]))
    _keep_columns(layer.net[2], kept)


def input_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The layers whose rows belong to heads: queries, keys and values of every stream, by name."""
    layers = {name: getattr(module, name, None) for name in _ROWS}
    return {name: layer for name, layer in layers.items() if layer is not None}


def output_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """The layers whose columns belong to heads: the output projection of every stream, by path in the module."""
    found: dict[str, nn.Linear] = {}
    for name in _COLUMNS:
        layer = getattr(module, name, None)
        if isinstance(layer, nn.ModuleList):
            name, layer = f"{name}.0", layer[0]
        if isinstance(layer, nn.Linear):
            found[name] = layer
    return found


def position_bias(model: nn.Module, name: str) -> mdtv2.RelativePositionBias | None:
    """The bias that MDTv2 keeps by head beside an attention block; None in other models."""
    bias = getattr(model.get_submodule(name.rpartition(".")[0]), "position_bias", None)
    return bias if isinstance(bias, mdtv2.RelativePositionBias) else None


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    linear.weight = _part(linear.weight, rows, 0)
    if linear.bias is not None:
        linear.bias = _part(linear.bias, rows, 0)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    linear.weight = _part(linear.weight, columns, 1)
    linear.in_features = len(columns)


def _part(parameter: Tensor, kept: Tensor, dim: int) -> nn.Parameter:
    chosen = parameter.detach().index_select(dim, kept.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)
