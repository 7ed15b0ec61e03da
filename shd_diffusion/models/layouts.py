"""Where a model keeps its heads and its neurons: which rows and columns of which layers.

Heads are rows of what makes queries, keys and values and columns of what projects their outputs; neurons are rows of
what makes them and columns of what they go into. These are layers of their own, or parts of one that several share:
the single blocks of Flux project heads and neurons by one layer, those of Flux.2 also make both by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import FeedForward, LuminaFeedForward
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowFeedForward
from diffusers.models.transformers.sana_transformer import GLUMBConv
from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward, Flux2ParallelSelfAttention
from diffusers.models.transformers.transformer_z_image import FeedForward as ZImageFeedForward
from torch import nn

from shd_diffusion.attention.blocks import processor_name


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows, or columns, of one layer that follow one another.

    Attributes:
        layer: module path in the model.
        start: the first of them.
        length: how many.
    """

    layer: str
    start: int
    length: int

    @property
    def indices(self) -> slice:
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Where the M heads of an attention block are.

    Attributes:
        heads: M.
        key_value_heads: G; each serves M / G neighbouring heads.
        width: d.
        queries: rows, of each stream; M·d.
        keys: rows, of each stream; G·d.
        values: rows, of each stream; G·d.
        outputs: columns, of each stream that is projected; M·d.
        query_norms: paths of the norms that take the queries of all heads together.
        key_norms: the same for keys.
    """

    heads: int
    key_value_heads: int
    width: int
    queries: tuple[Slice, ...]
    keys: tuple[Slice, ...]
    values: tuple[Slice, ...]
    outputs: tuple[Slice, ...]
    query_norms: tuple[str, ...] = ()
    key_norms: tuple[str, ...] = ()

    @property
    def sharing(self) -> int:
        """How many heads share a key and a value."""
        return self.heads // self.key_value_heads

    @property
    def inputs(self) -> tuple[Slice, ...]:
        """All rows: queries, keys and values of each stream."""
        return self.queries + self.keys + self.values


@dataclass(frozen=True, slots=True)
class NeuronLayout:
    """Where the neurons of a feed-forward layer are; a gated unit is one neuron.

    Attributes:
        neurons: n.
        inputs: rows, n each: values, and gates where it has them.
        output: columns, n.
    """

    neurons: int
    inputs: tuple[Slice, ...]
    output: Slice


# --- heads --------------------------------------------------------------------------------------------------


def head_layout(model: nn.Module, name: str) -> HeadLayout:
    """Where the heads of an attention block are.

    Raises:
        ValueError: in a way that is not known.
    """
    module: Any = model.get_submodule(name)
    kind = type(module).__name__
    unknown = ValueError(f"attention block `{name}` is a {kind} of a layout whose heads cannot be squeezed")
    # what has no `inner_dim` or no `set_processor` (Mochi's) is none of diffusers' usual layouts
    if not (hasattr(module, "inner_dim") and hasattr(module, "set_processor")):
        raise unknown
    if getattr(module, "fused_projections", False):
        raise ValueError(f"attention block `{name}` has fused projections; call unfuse_qkv_projections()")
    if "AddedKV" in processor_name(module) or processor_name(module) == "OmniGenAttnProcessor2_0":
        raise ValueError(
            f"attention block `{name}` has a processor of fixed width: its heads cannot be squeezed"
        )
    if processor_name(module) == "LuminaAttnProcessor2_0":
        raise ValueError(
            f"attention block `{name}` is gated by head outside, so that its heads cannot be squeezed"
        )
    inner = module.inner_dim
    if isinstance(module, Flux2ParallelSelfAttention):
        query, key, value = (Slice(f"{name}.to_qkv_mlp_proj", i * inner, inner) for i in range(3))
        output = Slice(f"{name}.to_out", 0, inner)
        return HeadLayout(
            module.heads, module.heads, inner // module.heads, (query,), (key,), (value,), (output,)
        )
    queries, keys, values = (
        tuple(_rows(model, f"{name}.{layer}") for layer in layers if getattr(module, layer, None) is not None)
        for layers in (("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj"))
    )
    outputs = tuple(Slice(path, 0, inner) for path in _output_paths(model, name))
    if not (outputs and all(getattr(module, layer, None) is not None for layer in ("to_q", "to_k", "to_v"))):
        raise unknown
    width = inner // module.heads
    norms = {
        norm: f"{name}.{norm}"
        for norm in ("norm_q", "norm_added_q", "norm_k", "norm_added_k")
        if _size(getattr(module, norm, None)) > width
    }
    return HeadLayout(
        module.heads,
        keys[0].length // width,
        width,
        queries,
        keys,
        values,
        outputs,
        query_norms=tuple(path for norm, path in norms.items() if norm.endswith("q")),
        key_norms=tuple(path for norm, path in norms.items() if norm.endswith("k")),
    )


def _output_paths(model: nn.Module, name: str) -> list[str]:
    """The layers that project heads: one of each stream, or the one that a block projects its neurons by as well."""
    module: Any = model.get_submodule(name)
    found = []
    for attribute in ("to_out", "to_add_out"):
        layer = getattr(module, attribute, None)
        if isinstance(layer, nn.ModuleList):
            attribute, layer = f"{attribute}.0", layer[0]
        if isinstance(layer, nn.Linear):
            found.append(f"{name}.{attribute}")
    around = name.rpartition(".")[0]
    return found or [path for path in (f"{around}.proj_out",) if _projects_both(model.get_submodule(around))]


def _projects_both(block: Any) -> bool:
    """Whether this is a single block of Flux or one of its kin: heads, then neurons, go into `proj_out`."""
    layers = (getattr(block, layer, None) for layer in ("proj_mlp", "proj_out"))
    return all(isinstance(layer, nn.Linear) for layer in layers) and hasattr(block, "attn")


def _rows(model: nn.Module, path: str) -> Slice:
    layer: Any = model.get_submodule(path)
    return Slice(path, 0, layer.out_features)


def _size(norm: Any) -> int:
    """Channels that a norm has a weight for."""
    weight = getattr(norm, "weight", None)
    return 0 if weight is None else weight.numel()


# --- neurons ------------------------------------------------------------------------------------------------

# Of each class the layers whose rows are neurons, once or twice, and the one whose columns they are.
_FEED_FORWARDS: dict[type[nn.Module], tuple[tuple[str, ...], str]] = {
    FeedForward: (("net.0.proj",), "net.2"),
    LuminaFeedForward: (("linear_1", "linear_3"), "linear_2"),
    AuraFlowFeedForward: (("linear_1", "linear_2"), "out_projection"),
    ZImageFeedForward: (("w1", "w3"), "w2"),
    Flux2FeedForward: (("linear_in",), "linear_out"),
    GLUMBConv: (("conv_inverted", "conv_depth"), "conv_point"),
}


def feed_forwards(model: nn.Module) -> dict[str, NeuronLayout]:
    """The feed-forward layers that can be squeezed, by module path.

    Where a single block makes heads and neurons side by side, the path is that of a part which neurons alone go
    through: `proj_mlp`, or Flux.2's `attn.mlp_act_fn`.
    """
    found = {}
    for name, module in model.named_modules():
        kind = next((kind for kind in _FEED_FORWARDS if isinstance(module, kind)), None)
        if kind is not None:
            inputs, output = _FEED_FORWARDS[kind]
            found[name] = _neurons(model, [f"{name}.{layer}" for layer in inputs], f"{name}.{output}", 0, 0)
        elif isinstance(module, Flux2ParallelSelfAttention):
            inner = module.inner_dim
            found[f"{name}.mlp_act_fn"] = _neurons(
                model, [f"{name}.to_qkv_mlp_proj"], f"{name}.to_out", 3 * inner, inner
            )
        elif _projects_both(module):
            block: Any = module
            found[f"{name}.proj_mlp"] = _neurons(
                model, [f"{name}.proj_mlp"], f"{name}.proj_out", 0, block.attn.inner_dim
            )
    return found


def _neurons(
    model: nn.Module, inputs: list[str], output: str, first_row: int, first_column: int
) -> NeuronLayout:
    """Neurons are what is left of rows and columns behind the heads; values come before gates, or gates before."""
    count = _weight(model, output).shape[1] - first_column
    slices = [
        Slice(layer, start, count)
        for layer in inputs
        for start in range(first_row, len(_weight(model, layer)), count)
    ]
    return NeuronLayout(count, tuple(slices), Slice(output, first_column, count))


def _weight(model: nn.Module, path: str) -> nn.Parameter:
    layer: Any = model.get_submodule(path)
    weight: nn.Parameter = layer.weight
    return weight
