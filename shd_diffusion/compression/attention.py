"""One attention block with fewer heads, fitted on the calls of it that a walk through the model has brought."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.attention.blocks import kernel_calls
from shd_diffusion.attention.probe import CONTEXT, MAIN
from shd_diffusion.compression.lockstep import Call
from shd_diffusion.models.squeezed import (
    check_heads_can_be_cut,
    check_heads_can_be_widened,
    cut_heads,
    input_layers,
    output_layers,
    widen_heads,
)
from shd_diffusion.squeezing import match_merges, plan_merges
from shd_diffusion.squeezing.heads import (
    RIDGE,
    factor_queries_keys,
    head_movements,
    merge_values,
    refit_heads,
    select_heads,
)
from shd_diffusion.squeezing.map_stream import MapStream, cut, stream
from shd_diffusion.squeezing.moments import Moments, ridge, solve
from shd_diffusion.squeezing.plan import Plan, Round, members

Pairing = Literal["adjacent", "matched"]
Queries = Literal["select", "factor"]

Features: TypeAlias = Callable[[], Iterator[tuple[str, Tensor, Tensor]]]
"""Of each output layer its path, rows of features F_j = A'_j H (rows, N, c), and what it should put out (rows, C)."""

_AT_ONCE = 2**24  # elements of features that exist at once
_MATCHED_ON = 64  # samples on which pairs are found


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How the heads of a block are squeezed.

    Attributes:
        pairing: which heads merge: `adjacent` ones, or those that lose least (`match_merges`).
        queries: `select` (`select_heads`) or `factor` (`factor_queries_keys`).
        rounds: of the refit.
        rows: query rows of each sample that the refit sees, drawn at random; None for all.
        head_dim: of the heads that stay; None: as the teacher's.
    """

    pairing: Pairing = "matched"
    queries: Queries = "select"
    rounds: int = 4
    rows: int | None = None
    head_dim: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Which layers of an attention block belong together.

    Attributes:
        values: the layers that make the values, in the order of their keys.
        outputs: by path of each output layer, the suffixes of the records whose query rows it projects, in their order.
    """

    values: tuple[str, ...]
    outputs: dict[str, tuple[str, ...]]


@dataclass(slots=True)
class Sights:
    """What the block with all its heads showed on the calls.

    Attributes:
        movements: `head_movements` over all streams, (M,).
        records: of the main stream, of the first samples.
        query_inputs: moments of the queries' inputs (targets unused), for `factor`.
        key_inputs: moments of the keys' inputs.
    """

    movements: Tensor
    records: list[AttentionRecord]
    query_inputs: Moments | None = None
    key_inputs: Moments | None = None


def squeeze_attention(
    model: nn.Module,
    name: str,
    heads: int,
    calls: Sequence[Call],
    targets: Mapping[str, Sequence[Tensor]],
    options: HeadOptions,
) -> tuple[float, float]:
    """Leave an attention block so many heads, as close to the targets as least squares brings them, in place.

    Values and output weights are refitted in turn where the block has one output layer. Where two streams share the
    maps and each has an output layer of its own, the merged values stay and both output layers are fitted.

    Args:
        model: the model around the block.
        name: module path of the block.
        heads: N, fewer than the block's M.
        calls: the block's calls with the calibration batches; a mask by head is cut with the heads.
        targets: by path of each output layer, what it should put out in each call, (B, Q, C).
        options: how.

    Returns:
        |error|² / |target|², about the means, of the merged heads and of the fitted ones.

    Raises:
        ValueError: the block is of a kind that cannot be squeezed.
    """
    check_can_be_squeezed(model, name, options)
    module: Any = model.get_submodule(name)
    layout, before, width = layout_of(module), module.heads, module.inner_dim // module.heads
    projections = list(output_layers(module).values())
    query, key = (_by_head(layer, before) for layer in (module.to_q, module.to_k))
    value = torch.cat([_by_head(getattr(module, layer), before) for layer in layout.values], 1)
    # W^O of all streams side by side, (M, d, C)
    outputs = torch.cat([p.weight.detach().T.unflatten(0, (before, width)) for p in projections], 2).double()

    seen = _look(model, name, calls, options.queries == "factor")
    groups = members(_plan(seen.records, heads, options.pairing), before)
    selected = select_heads(groups, seen.movements)
    cut_heads(model, name, torch.tensor(selected))
    wider = options.head_dim or width
    if wider != width:
        widen_heads(model, name, wider)
    for call in calls:
        _cut_mask(call, before, selected)
    if seen.query_inputs is not None and seen.key_inputs is not None:
        grams = seen.query_inputs.gram, seen.key_inputs.centred().gram
        for j, group in enumerate(groups):
            shares = seen.movements[list(group)] / seen.movements[list(group)].sum()
            merged_query, merged_key = factor_queries_keys(
                query[list(group)], key[list(group)], shares, *grams, wider
            )
            # attention divides the logits by the root of the width
            _write_head(module.to_q, j, merged_query * (wider / width) ** 0.5)
            _write_head(module.to_k, j, merged_key)

    seen_again = partial(_features, model, name, calls, targets, options.rows)
    if len(projections) == 1:
        return _fit_values_and_output(module, seen_again, value, outputs, groups, wider, options.rounds)
    return _fit_outputs(module, seen_again, value, outputs, groups, wider)


def layout_of(module: Any) -> Layout:
    """The layers of an attention block by stream."""
    ((_, order),) = kernel_calls(module)
    paths = list(output_layers(module))
    names = {MAIN: "to_v", CONTEXT: "add_v_proj"}
    if getattr(module, "add_q_proj", None) is not None:  # two streams with projections of their own
        return Layout(
            tuple(names[stream] for stream in order), dict(zip(paths, ((MAIN,), (CONTEXT,)), strict=False))
        )
    return Layout(("to_v",), {paths[0]: order})


def check_can_be_squeezed(model: nn.Module, name: str, options: HeadOptions) -> None:
    """Raise ValueError unless the heads of that block can be squeezed so."""
    check_heads_can_be_cut(model, name)
    module: Any = model.get_submodule(name)
    if len(kernel_calls(module)) != 1:
        raise ValueError(f"attention block `{name}` attends twice, to text and image: it cannot be squeezed")
    width = module.inner_dim // module.heads
    if options.head_dim is not None and options.head_dim != width:
        check_heads_can_be_widened(model, name)
        if options.head_dim < width:
            raise ValueError(
                f"attention block `{name}` has heads of width {width}, not to become {options.head_dim}"
            )
    if options.queries == "factor" and (
        getattr(module, "norm_q", None) is not None
        or layout_of(module) != Layout(("to_v",), {"to_out.0": (MAIN,)})
    ):
        raise ValueError(
            f"attention block `{name}` normalises its queries or joins two streams; "
            "take `select` instead of `factor`"
        )


# --- fitting ------------------------------------------------------------------------------------------------


def _fit_values_and_output(
    module: Any, seen: Features, value: Tensor, outputs: Tensor, groups: Round, width: int, rounds: int
) -> tuple[float, float]:
    """Fit values and the one output layer of a block whose queries and keys are there already."""
    (projection,) = output_layers(module).values()
    heads, inputs = len(groups), value.shape[1]
    moments = Moments.zeros(heads * inputs, projection.out_features, value.device)
    for _, features, target in seen():
        moments.add(features.flatten(1), target)
    fitted = moments if projection.bias is None else moments.centred()
    blocks = fitted.gram.unflatten(0, (heads, inputs)).unflatten(2, (heads, inputs))
    own = torch.stack([blocks[j, :, j] for j in range(heads)])
    values, merged = merge_values(value, outputs, groups, own, width)
    started = fitted.loss((values @ merged).flatten(0, 1))
    values, merged, _ = refit_heads(fitted, values, merged, rounds)
    circuits = (values @ merged).flatten(0, 1)
    _write_values(module, values)
    _write_output(projection, merged.flatten(0, 1), moments.constant(circuits))
    return started / float(fitted.energy), fitted.loss(circuits) / float(fitted.energy)


def _fit_outputs(
    module: Any, seen: Features, value: Tensor, outputs: Tensor, groups: Round, width: int
) -> tuple[float, float]:
    """Merge the values of a block whose queries and keys are there already, and fit each of its output layers."""
    heads, inputs = len(groups), value.shape[1]
    own = value.new_zeros(heads, inputs, inputs)
    for _, features, _ in seen():
        by_head = features.transpose(0, 1).double()
        own += by_head.mT @ by_head
    values, merged = merge_values(value, outputs, groups, own, width)
    _write_values(module, values)

    projections = output_layers(module)
    moments = {
        path: Moments.zeros(heads * width, layer.out_features, value.device)
        for path, layer in projections.items()
    }
    for path, features, target in seen():
        mixed = torch.einsum("rjc,jcd->rjd", features.double(), values)
        moments[path].add(mixed.flatten(1), target)
    started = lost = energy = 0.0
    parts = merged.flatten(0, 1).split([layer.out_features for layer in projections.values()], 1)
    for (path, layer), before in zip(projections.items(), parts, strict=True):
        fitted = moments[path] if layer.bias is None else moments[path].centred()
        gram = fitted.gram.clone()
        gram.diagonal().add_(ridge(gram, RIDGE))
        weight = solve(gram, fitted.cross)
        _write_output(layer, weight, moments[path].constant(weight))
        started, lost = started + fitted.loss(before), lost + fitted.loss(weight)
        energy += float(fitted.energy)
    return started / energy, lost / energy


# --- passes over the calls ----------------------------------------------------------------------------------


def _runs(
    model: nn.Module, name: str, calls: Sequence[Call]
) -> Iterator[tuple[dict[str, AttentionRecord], dict[str, Tensor]]]:
    """The block's records of each call by suffix, and the inputs (B, tokens, c) of its layers by their names."""
    module: Any = model.get_submodule(name)
    inputs: dict[str, Tensor] = {}

    def keep(layer: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[layer] = args[0]

    with ExitStack() as stack:
        capture = stack.enter_context(AttentionCapture(model, [name]))
        for layer, linear in input_layers(module).items():
            stack.enter_context(linear.register_forward_pre_hook(partial(keep, layer)))
        for call in calls:
            module(*call.args, **call.kwargs)
            yield {key.removeprefix(name): record for key, record in capture.records.items()}, dict(inputs)


def _look(model: nn.Module, name: str, calls: Sequence[Call], factor: bool) -> Sights:
    """Run the block with all its heads."""
    module: Any = model.get_submodule(name)
    device = module.to_q.weight.device
    seen = Sights(torch.zeros(module.heads, dtype=torch.float64, device=device), [])
    for records, inputs in _runs(model, name, calls):
        for record in records.values():
            weight = record.output_weight.detach().double().T.unflatten(0, (record.heads, -1))  # (M, d, C)
            grams = weight @ weight.mT
            for samples in _samples(record, record.key.shape[2]):
                maps = record.maps(samples=samples)
                seen.movements += head_movements(maps, record.value[samples].to(maps.dtype), grams)
        have = sum(len(record.query) for record in seen.records)
        if have < _MATCHED_ON:
            seen.records.append(records[MAIN].of_samples(slice(_MATCHED_ON - have)))
        if factor:
            if seen.query_inputs is None or seen.key_inputs is None:
                seen.query_inputs, seen.key_inputs = (
                    Moments.zeros(layer.in_features + (layer.bias is not None), 1, device)
                    for layer in (module.to_q, module.to_k)
                )
            for layer, moments in (("to_q", seen.query_inputs), ("to_k", seen.key_inputs)):
                rows = _with_one(getattr(module, layer), inputs[layer]).flatten(0, 1)
                moments.add(rows, rows[:, :1])
    return seen


def _plan(records: Sequence[AttentionRecord], heads: int, pairing: Pairing) -> Plan:
    if pairing == "adjacent":
        return plan_merges(records[0].heads, heads)
    batches = [(_map_stream(record), record.value.float()) for record in records]
    return match_merges(batches, records[0].output_weight.detach().float(), heads)


def _map_stream(record: AttentionRecord) -> MapStream:
    batch, heads, rows, _ = record.query.shape
    shape = batch, heads, rows, record.key.shape[2]
    return stream(shape, lambda part: record.logits(samples=part[0], rows=part[1]), record.query.device)


def _features(
    model: nn.Module,
    name: str,
    calls: Sequence[Call],
    targets: Mapping[str, Sequence[Tensor]],
    rows: int | None,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """See `Features`; H has a 1 appended where the values have a bias."""
    module: Any = model.get_submodule(name)
    layout, drawn = layout_of(module), torch.Generator().manual_seed(0)
    for number, (records, inputs) in enumerate(_runs(model, name, calls)):
        made_from = [_with_one(getattr(module, layer), inputs[layer]) for layer in layout.values]
        for path, suffixes in layout.outputs.items():
            of_stream = [records[suffix] for suffix in suffixes]
            parts = targets[path][number].split([record.query.shape[2] for record in of_stream], 1)
            for record, target in zip(of_stream, parts, strict=True):
                count = target.shape[1]
                index = torch.randperm(count, generator=drawn)[: rows or count].to(target.device)
                widest = max(record.key.shape[2], sum(each.shape[2] for each in made_from))
                for samples in _samples(record, widest, len(index)):
                    maps = record.maps(samples=samples, rows=index)
                    split = maps.split([each.shape[1] for each in made_from], 3)
                    features = [
                        a @ h[samples, None].to(a.dtype) for a, h in zip(split, made_from, strict=True)
                    ]
                    joined = torch.cat(features, 3).transpose(1, 2)  # (samples, rows, N, c)
                    yield path, joined.flatten(0, 1), target[samples][:, index].flatten(0, 1)


def _samples(record: AttentionRecord, width: int, rows: int | None = None) -> list[slice]:
    """Samples that fit into memory together, with tensors of (heads, rows, width) each."""
    batch, heads, count, _ = record.query.shape
    return cut(batch, max(1, _AT_ONCE // (heads * (rows or count) * width)))


# --- weights ------------------------------------------------------------------------------------------------


def _with_one(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """What a layer's weight and bias multiply: its inputs, with a 1 where it has a bias."""
    if linear.bias is None:
        return inputs
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], -1)


def _by_head(linear: nn.Linear, heads: int) -> Tensor:
    """A layer's weight and bias as they multiply `_with_one` from the right, (heads, c, d), float64."""
    parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
    return torch.cat(parts, 1).detach().double().unflatten(0, (heads, -1)).mT


def _write_head(linear: nn.Linear, head: int, weight: Tensor) -> None:
    """The rows of one head from what `_by_head` gives of it."""
    rows = slice(head * weight.shape[1], (head + 1) * weight.shape[1])
    linear.weight.data[rows] = weight[: linear.in_features].T.to(linear.weight)
    if linear.bias is not None:
        linear.bias.data[rows] = weight[-1].to(linear.bias)


def _write_values(module: Any, values: Tensor) -> None:
    """Values of all heads (N, c, d), of all layers that make them one after the other."""
    layers = [getattr(module, layer) for layer in layout_of(module).values]
    sizes = [layer.in_features + (layer.bias is not None) for layer in layers]
    for head, of_head in enumerate(values):
        for layer, weight in zip(layers, of_head.split(sizes), strict=True):
            _write_head(layer, head, weight)


def _write_output(linear: nn.Linear, weight: Tensor, constant: Tensor) -> None:
    linear.weight.data.copy_(weight.T)
    if linear.bias is not None:
        linear.bias.data.copy_(constant)


def _cut_mask(call: Call, heads: int, kept: Sequence[int]) -> None:
    """Leave a mask that differs by head, (B or 1, M, Q, K), only those of the heads that stay."""
    mask = call.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == heads:
        call.kwargs = {**call.kwargs, "attention_mask": mask[:, list(kept)]}
