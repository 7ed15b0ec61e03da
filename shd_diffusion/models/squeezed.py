"""Models whose blocks have fewer heads or neurons than their class's config can say.

`Squeezed<X>` is the diffusers class X with more entries in its config: the heads, the keys and values that these share
if they do, and the neurons of the blocks that differ. It is built as X is and then cut to shape, so it is saved and
loaded like any other model.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.models.modeling_utils import LegacyModelMixin
from torch import Tensor, nn

from shd_diffusion.attention import attention_blocks
from shd_diffusion.models import dit, mdtv2
from shd_diffusion.models.layouts import HeadLayout, Slice, feed_forwards, head_layout
from shd_diffusion.squeezing.shared_keys import key_value_counts

PREFIX = "Squeezed"
CONFIG_KEYS = ("squeezed_heads", "squeezed_key_value_heads", "squeezed_neurons")


@functools.cache
def squeezed_class(kind: type[ModelMixin]) -> type[ModelMixin]:
    """`Squeezed<kind>`: `kind`, whose constructor also takes `squeezed_heads` and `squeezed_neurons`.

    Both map module paths (`transformer_blocks.0.attn1`, `transformer_blocks.0.ff`) to counts; what they leave out is as
    in `kind`. `squeezed_key_value_heads` counts the keys and values of heads that share them; left out, there are as
    many as can be (`key_value_counts`).

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
        squeezed_key_value_heads: Mapping[str, int] | None = None,
        squeezed_neurons: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        kind.__init__(self, *args, **kwargs)
        counts = [dict(each or {}) for each in (squeezed_heads, squeezed_key_value_heads, squeezed_neurons)]
        self.register_to_config(**dict(zip(CONFIG_KEYS, counts, strict=True)))
        heads, key_values, neurons = counts
        for name, count in heads.items():
            cut_heads(self, name, first_heads(head_layout(self, name), count, key_values.get(name)))
        for name, count in neurons.items():
            cut_neurons(self, name, torch.arange(count, device="cpu"))

    # diffusers reads from the signature what a config may hold.
    own = list(inspect.signature(__init__).parameters.values())[2:5]
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
    blocks = attention_blocks(model)
    kind: Any = type(model)
    model.__class__ = squeezed_class(kind)
    earlier = {key: dict(getattr(model.config, key, None) or {}) for key in CONFIG_KEYS}
    heads = earlier["squeezed_heads"] | {n: count for n, count in differing.items() if n in blocks}
    neurons = earlier["squeezed_neurons"] | {n: count for n, count in differing.items() if n not in blocks}
    shared = {name: count for name in heads if (count := blocks[name].key_value_heads) != heads[name]}
    model.register_to_config(**dict(zip(CONFIG_KEYS, (heads, shared, neurons), strict=True)))


def shape(model: nn.Module) -> dict[str, int]:
    """Heads of every attention block and neurons of every feed-forward layer, by module path."""
    heads = {name: block.heads for name, block in attention_blocks(model).items()}
    return heads | {name: layer.neurons for name, layer in feed_forwards(model).items()}


# --- cutting ------------------------------------------------------------------------------------------------


def first_heads(layout: HeadLayout, heads: int, key_value_heads: int | None = None) -> Tensor:
    """The first heads (N,) of the first key/value heads, as many of each as is asked for.

    Raises:
        ValueError: no such numbers can be cut from this layout.
    """
    if key_value_heads is None:
        key_value_heads = key_value_counts(layout.heads, layout.key_value_heads).get(heads, layout.heads + 1)
    each = heads // key_value_heads
    if not (0 < key_value_heads <= layout.key_value_heads and 0 < each <= layout.sharing):
        raise ValueError(
            f"{layout.heads} heads on {layout.key_value_heads} keys and values cannot become {heads}"
        )
    of_each = torch.arange(each, device="cpu")
    return (torch.arange(key_value_heads, device="cpu")[:, None] * layout.sharing + of_each).flatten()


def cut_heads(model: nn.Module, name: str, kept: Tensor) -> None:
    """Leave an attention block only some of its heads, with their weights, in place.

    Where heads share keys and values, those that share one and follow one another in `kept` go on to share it. A norm
    over all heads keeps its weight in the channels that stay, although it then takes their mean square alone.

    Args:
        model: the model around the block.
        name: module path of the block.
        kept: (N,) indices of the heads that stay, in their new order.

    Raises:
        ValueError: the block's heads cannot be cut, it has no such heads, or unequal numbers would share a key.
    """
    layout = head_layout(model, name)
    if not len(kept) or int(kept.max()) >= layout.heads:
        raise ValueError(f"attention block `{name}` has {layout.heads} heads, not those: {kept.tolist()}")
    channels, key_value_channels = kept_channels(layout, kept, name)
    rows = [(part, channels) for part in layout.queries]
    rows += [(part, key_value_channels) for part in layout.keys + layout.values]
    _keep(model, rows, 0)
    _keep(model, [(part, channels) for part in layout.outputs], 1)
    for path, its in norms_over_heads(layout, channels, key_value_channels).items():
        cut_norm(model.get_submodule(path), its)
    if (bias := position_bias(model, name)) is not None:
        bias.table = _part(bias.table, kept, 1)
    module: Any = model.get_submodule(name)
    module.heads, module.inner_dim = len(kept), len(channels)
    for attribute in ("inner_kv_dim", "kv_inner_dim"):
        if hasattr(module, attribute):
            setattr(module, attribute, len(key_value_channels))
    if hasattr(module, "sliceable_head_dim"):
        module.sliceable_head_dim = len(kept)


def kept_channels(layout: HeadLayout, kept: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """The channels of queries and those of keys and values that stay with these heads, (N·d,) and (G'·d,).

    Raises:
        ValueError: unequal numbers of heads would share a key.
    """
    keys = kept
    if layout.sharing > 1:
        keys, counts = torch.unique_consecutive(kept // layout.sharing, return_counts=True)
        if len(counts.unique()) > 1:
            raise ValueError(
                f"attention block `{name}` shares keys among heads, as many each; not so {kept.tolist()}"
            )
    queries, key_values = (
        (heads[:, None] * layout.width + torch.arange(layout.width, device=heads.device)).flatten()
        for heads in (kept, keys)
    )
    return queries, key_values


def norms_over_heads(layout: HeadLayout, channels: Tensor, key_value_channels: Tensor) -> dict[str, Tensor]:
    """The channels that stay of each norm over all heads, by its path."""
    return dict.fromkeys(layout.query_norms, channels) | dict.fromkeys(layout.key_norms, key_value_channels)


def cut_norm(norm: Any, channels: Tensor) -> None:
    """Leave a norm only some of its channels, (n,), in place."""
    norm.weight = _part(norm.weight, channels, 0)
    if getattr(norm, "bias", None) is not None:
        norm.bias = _part(norm.bias, channels, 0)
    for attribute, value in (("normalized_shape", (len(channels),)), ("dim", torch.Size([len(channels)]))):
        if hasattr(norm, attribute):
            setattr(norm, attribute, value)


def widen_heads(model: nn.Module, name: str, width: int) -> None:
    """Give the heads of an attention block more channels, all 0, in place: it computes the same function.

    Queries grow by √(new width / old width), since attention divides logits by the root of the width. To fewer channels
    it leaves the first ones, for a caller who writes all weights of the heads anew.

    Args:
        model: the model around the block.
        name: module path of the block.
        width: channels of a head.

    Raises:
        ValueError: its queries are normalised or rotated, so that the function would be another one.
    """
    check_heads_can_be_widened(model, name)
    layout = head_layout(model, name)
    heads, before = layout.heads, layout.width
    for part in layout.inputs:
        linear: Any = model.get_submodule(part.layer)
        factor = (width / before) ** 0.5 if part in layout.queries else 1.0
        for key, parameter in linear.named_parameters():
            by_head = parameter.detach().unflatten(0, (heads, before)) * factor
            resized = nn.functional.pad(by_head, (0, 0) * (by_head.ndim - 2) + (0, width - before)).flatten(
                0, 1
            )
            setattr(linear, key, nn.Parameter(resized, requires_grad=parameter.requires_grad))
        linear.out_features = heads * width
    for part in layout.outputs:
        linear = model.get_submodule(part.layer)
        by_head = nn.functional.pad(linear.weight.detach().unflatten(1, (heads, before)), (0, width - before))
        linear.weight = nn.Parameter(by_head.flatten(1), requires_grad=linear.weight.requires_grad)
        linear.in_features = heads * width
    module: Any = model.get_submodule(name)
    module.inner_dim = heads * width
    if hasattr(module, "inner_kv_dim"):
        module.inner_kv_dim = heads * width
    if hasattr(module, "scale"):
        module.scale = width**-0.5


def check_heads_can_be_widened(model: nn.Module, name: str) -> None:
    """Raise ValueError unless the heads of that block can have another width."""
    layout = head_layout(model, name)
    module: Any = model.get_submodule(name)
    if (
        rotates(module)
        or getattr(module, "norm_q", None) is not None
        or not getattr(module, "scale_qk", True)
    ):
        raise ValueError(
            f"attention block `{name}` normalises, rotates or does not scale its queries: heads of another width "
            "compute something else"
        )
    layers = [part.layer for part in layout.inputs + layout.outputs]
    if layout.sharing > 1 or len(set(layers)) < len(layers) or any(not x.startswith(name) for x in layers):
        raise ValueError(
            f"attention block `{name}` shares keys or layers: its heads cannot have another width"
        )


def rotates(module: Any) -> bool:
    """Whether an attention block turns its queries and keys by a rotary embedding."""
    return any(
        "rotary" in parameter or "freqs" in parameter
        for parameter in inspect.signature(module.processor.__call__).parameters
    )


def cut_neurons(model: nn.Module, name: str, kept: Tensor) -> None:
    """Leave a feed-forward layer only some of its neurons, with their weights, in place.

    Args:
        model: the model around the layer.
        name: its path, one of `feed_forwards`.
        kept: (n,) indices of the neurons that stay.

    Raises:
        ValueError: it has no such neurons.
    """
    layout = feed_forwards(model)[name]
    if not len(kept) or int(kept.max()) >= layout.neurons:
        raise ValueError(
            f"`{name}`, a feed-forward layer of {layout.neurons} neurons, cannot keep {len(kept)} that it has not"
        )
    _keep(model, [(part, kept) for part in layout.inputs], 0)
    _keep(model, [(layout.output, kept)], 1)
    around: Any = model.get_submodule(name.rpartition(".")[0])
    if layout.output.start and hasattr(
        around, "mlp_hidden_dim"
    ):  # a single block splits by it what both share
        around.mlp_hidden_dim = len(kept)


def position_bias(model: nn.Module, name: str) -> mdtv2.RelativePositionBias | None:
    """The bias that MDTv2 keeps by head beside an attention block; None in other models."""
    bias = getattr(model.get_submodule(name.rpartition(".")[0]), "position_bias", None)
    return bias if isinstance(bias, mdtv2.RelativePositionBias) else None


def _keep(model: nn.Module, parts: Iterable[tuple[Slice, Tensor]], dim: int) -> None:
    """Of each slice leave its layer only the rows (dim 0) or columns (dim 1) that are kept, in their order."""
    by_layer: dict[str, list[tuple[Slice, Tensor]]] = {}
    for part, kept in parts:
        by_layer.setdefault(part.layer, []).append((part, kept))
    for path, of_layer in by_layer.items():
        layer: Any = model.get_submodule(path)
        pieces, end = [], 0
        for part, kept in sorted(of_layer, key=lambda each: each[0].start):
            pieces += [torch.arange(end, part.start, device=kept.device), part.start + kept]
            end = part.start + part.length
        pieces.append(torch.arange(end, layer.weight.shape[dim], device=pieces[0].device))
        _index(layer, torch.cat(pieces), dim)


def _index(layer: Any, index: Tensor, dim: int) -> None:
    """Leave a linear layer or a convolution, depthwise if it has groups, the rows or columns of this index."""
    layer.weight = _part(layer.weight, index, dim)
    if dim == 0 and layer.bias is not None:
        layer.bias = _part(layer.bias, index, 0)
    depthwise = dim == 0 and getattr(layer, "groups", 1) > 1
    for end in ("in", "out") if depthwise else (("out", "in")[dim],):
        setattr(layer, f"{end}_features" if isinstance(layer, nn.Linear) else f"{end}_channels", len(index))
    if depthwise:
        layer.groups = len(index)
    blocks = ("_tp_packed_col_blocks", "_tp_packed_row_blocks")[dim]
    if (sizes := getattr(layer, blocks, None)) is not None:  # what diffusers shards one by one
        ends = itertools.accumulate(sizes, initial=0)
        counts = [int(((index >= start) & (index < end)).sum()) for start, end in itertools.pairwise(ends)]
        setattr(layer, blocks, counts)


def _part(parameter: Tensor, kept: Tensor, dim: int) -> nn.Parameter:
    chosen = parameter.detach().index_select(dim, kept.to(parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)
