"""One attention block with fewer heads, fitted on the calls of it that a walk through the model has brought."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.attention.blocks import kernel_calls
from shd_diffusion.attention.probe import CONTEXT, MAIN
from shd_diffusion.compression.lockstep import Call
from shd_diffusion.models.layouts import HeadLayout, Slice, head_layout
from shd_diffusion.models.squeezed import (
    check_heads_can_be_widened,
    cut_heads,
    cut_norm,
    kept_channels,
    norms_over_heads,
    position_bias,
    rotates,
    widen_heads,
)
from shd_diffusion.squeezing import match_merges, plan_merges
from shd_diffusion.squeezing.heads import (
    RIDGE,
    ROUNDS,
    factor_queries_keys,
    head_movements,
    heads_to_keep,
    merge_values,
    refit_heads,
    select_heads,
    value_bases,
)
from shd_diffusion.squeezing.map_stream import MapStream, cut, stream
from shd_diffusion.squeezing.matching import merge_rounds
from shd_diffusion.squeezing.moments import Moments, ridge, solve
from shd_diffusion.squeezing.norms import ChannelMoments
from shd_diffusion.squeezing.plan import Plan, Round, members
from shd_diffusion.squeezing.shared_keys import (
    key_value_counts,
    plan_sharing,
    select_sharing,
    sharing_pairs,
)

Method = Literal["merge", "drop", "magnitude", "random"]
Pairing = Literal["adjacent", "matched"]
Queries = Literal["select", "factor"]

Features: TypeAlias = Callable[[], Iterator[tuple[str, Tensor, Tensor]]]
"""Of each output layer its path, rows of features F_j = A'_j H (rows, N, c), and what it should put out (rows, C)."""

Merge: TypeAlias = tuple[Round, tuple[int, ...]]
"""Groups of heads, and of each group the head whose map it takes."""

_AT_ONCE = 2**24  # elements of features that exist at once
_MATCHED_ON = 64, 2**12  # samples on which pairs are found, and their query rows, at most
_WIDEST = 2**11  # features of all heads; beyond it values are looked for in fewer directions


@dataclass(frozen=True, slots=True)
class HeadOptions:
    """How the heads of a block are squeezed.

    Attributes:
        method: `merge` them; or the baselines, whose output weights alone are refitted: `drop` those that least
            squares miss least (`heads_to_keep`), or those with the smallest weights (`magnitude`), or draw the queries,
            keys and values of all heads anew, as large as they were (`random`).
        pairing: which heads merge: `adjacent` ones, or those that lose least (`match_merges`).
        queries: `select` (`select_heads`) or `factor` (`factor_queries_keys`).
        rounds: of the refit.
        rows: query rows of each sample that the refit sees, drawn at random; None for all.
        head_dim: of the heads that stay; None: as the teacher's. Narrower ones need `factor`.
    """

    method: Method = "merge"
    pairing: Pairing = "matched"
    queries: Queries = "select"
    rounds: int = ROUNDS
    rows: int | None = None
    head_dim: int | None = None


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
) -> tuple[Round, float, float]:
    """Leave an attention block so many heads, as close to the targets as least squares brings them, in place.

    Values and output weights are refitted in turn where each head has both for itself. Where two streams share the maps
    and each has an output layer of its own, or where heads share values, the merged values stay and the output layers
    are fitted.

    Args:
        model: the model around the block.
        name: module path of the block.
        heads: N, fewer than the block's M.
        calls: the block's calls with the calibration batches; a mask by head is cut with the heads.
        targets: by path of each output layer, what it should put out in each call by the columns of its heads and its
            bias, (B, Q, C).
        options: how.

    Returns:
        The heads behind each that stays; and |error|² / |target|², about the means, of the merged heads and of the
        fitted ones.

    Raises:
        ValueError: the block is of a kind that cannot be squeezed.
    """
    check_can_be_squeezed(model, name, options)
    layout = head_layout(model, name)
    before, width = layout.heads, layout.width
    if options.method == "random":
        _draw_anew(model, layout)
    query, key = (_by_head(model, part, width) for part in (layout.queries[0], layout.keys[0]))
    value, outputs = _values_and_outputs(model, name)
    bias = position_bias(model, name)
    table = None if bias is None else bias.table.detach()

    seen = _look(model, name, calls, options.queries == "factor")
    if options.method == "merge":
        groups, selected = _merge(seen, layout, heads, options.pairing)
    else:
        selected = _kept(model, name, heads, calls, targets, value, outputs, options)
        groups = tuple((head,) for head in selected)
    norms = _fit_norms(model, name, layout, torch.tensor(selected), calls)
    cut_heads(model, name, torch.tensor(selected))
    for path, (factor, shift) in norms.items():
        _scale_norm(model.get_submodule(path), factor, shift)
    wider = options.head_dim or width
    if wider != width:
        widen_heads(model, name, wider)
    for call in calls:
        _cut_mask(call, before, selected)
    if seen.query_inputs is not None and seen.key_inputs is not None:
        layout = head_layout(model, name)
        grams = seen.query_inputs.gram, seen.key_inputs.centred().gram
        for j, group in enumerate(groups):
            shares = seen.movements[list(group)] / seen.movements[list(group)].sum()
            merged_query, merged_key = factor_queries_keys(
                query[list(group)], key[list(group)], shares, *grams, wider
            )
            # attention divides the logits by the root of the width
            _write_head(model, layout.queries[0], j, merged_query * (wider / width) ** 0.5)
            _write_head(model, layout.keys[0], j, merged_key)
            if bias is not None and table is not None:
                bias.table.data[:, j] = table[:, list(group)] @ shares.to(table)

    layout = head_layout(model, name)
    seen_again = partial(_features, model, name, calls, targets, options.rows)
    with_values = options.method == "merge" and len(layout.outputs) == 1 and layout.sharing == 1
    if with_values:
        lost = _fit_values_and_output(model, name, seen_again, value, outputs, groups, options.rounds)
    else:
        lost = _fit_outputs(model, name, seen_again, value, outputs, groups)
    return groups, *lost


def head_losses(
    model: nn.Module,
    name: str,
    counts: Sequence[int],
    calls: Sequence[Call],
    targets: Mapping[str, Sequence[Tensor]],
    options: HeadOptions,
) -> dict[int, float]:
    """What an attention block loses by so many heads of which values are merged and the output layers fitted.

    All counts are fitted in two passes over the calls, by maps that are there already; the block stays as it is. What
    `squeeze_attention` loses is less where it refits the values too, by nearly the same factor at every count.

    Args:
        model: see `squeeze_attention`.
        name: see `squeeze_attention`.
        counts: numbers of heads among `head_counts`, fewer than the block's M.
        calls: see `squeeze_attention`; they stay as they are.
        targets: see `squeeze_attention`.
        options: their pairing and rows count.

    Returns:
        |error|² / |target|², about the means, by count.

    Raises:
        ValueError: the block is of a kind that cannot be squeezed.
    """
    check_can_be_squeezed(model, name, options)
    layout = head_layout(model, name)
    value, outputs = _values_and_outputs(model, name)
    seen = _look(model, name, calls, False)
    merges = [_merge(seen, layout, count, options.pairing) for count in counts]
    fits = _output_fits(
        model, name, partial(_features, model, name, calls, targets, options.rows), value, outputs, merges
    )
    return {count: fit.solve(model)[2] for count, fit in zip(counts, fits, strict=True)}


def check_can_be_squeezed(model: nn.Module, name: str, options: HeadOptions) -> None:
    """Raise ValueError unless the heads of that block can be squeezed so."""
    layout = head_layout(model, name)
    module: Any = model.get_submodule(name)
    if len(kernel_calls(module)) != 1:
        raise ValueError(f"attention block `{name}` attends twice, to text and image: it cannot be squeezed")
    if options.head_dim is not None and options.head_dim != layout.width:
        check_heads_can_be_widened(model, name)
        if options.head_dim < layout.width and options.queries == "select":
            raise ValueError(
                f"attention block `{name}` has heads of width {layout.width}, not to become {options.head_dim}"
            )
    if options.method != "merge" and (len(layout.outputs) > 1 or layout.sharing > 1):
        raise ValueError(
            f"attention block `{name}` joins two streams or shares its keys; take the method `merge`"
        )
    plain = len(layout.queries) == layout.sharing == 1 and _streams(model, name) == ((MAIN,),)
    if options.queries == "factor" and (
        rotates(module) or getattr(module, "norm_q", None) is not None or not plain
    ):
        raise ValueError(
            f"attention block `{name}` normalises or rotates its queries, shares its keys or joins two streams, so "
            "wider heads cannot be made of its own; leave --plain out, or keep the heads as wide as they are"
        )


def head_counts(model: nn.Module, name: str) -> tuple[int, ...]:
    """The numbers of heads that an attention block can have; fewer than all up to M where heads share keys.

    Raises:
        ValueError: it is of a layout whose heads cannot be squeezed.
    """
    layout = head_layout(model, name)
    return tuple(key_value_counts(layout.heads, layout.key_value_heads))


def _streams(model: nn.Module, name: str) -> tuple[tuple[str, ...], ...]:
    """For each output layer of a block the suffixes of the records whose query rows it projects, in their order."""
    ((_, order),) = kernel_calls(model.get_submodule(name))
    layout = head_layout(model, name)
    if len(layout.queries) == 2:  # two streams with projections of their own
        return ((MAIN,), (CONTEXT,))[: len(layout.outputs)]
    return (order,)


def _values(model: nn.Module, name: str) -> tuple[Slice, ...]:
    """The rows that make a block's values, in the order of their keys."""
    ((_, order),) = kernel_calls(model.get_submodule(name))
    values = head_layout(model, name).values
    return values[::-1] if len(values) == 2 and order[0] == CONTEXT else values


# --- baselines ----------------------------------------------------------------------------------------------


def _draw_anew(model: nn.Module, layout: HeadLayout) -> None:
    """Random queries, keys and values, as large as those that there are."""
    drawn = torch.Generator().manual_seed(0)
    for part in (*layout.queries, *layout.keys, *layout.values):
        linear: Any = model.get_submodule(part.layer)
        rows = linear.weight[part.indices]
        linear.weight.data[part.indices] = torch.randn(rows.shape, generator=drawn).to(rows) * rows.std()


def _kept(
    model: nn.Module,
    name: str,
    heads: int,
    calls: Sequence[Call],
    targets: Mapping[str, Sequence[Tensor]],
    value: Tensor,
    outputs: Tensor,
    options: HeadOptions,
) -> tuple[int, ...]:
    """The heads that stay where none merge."""
    layout = head_layout(model, name)
    if options.method == "random":
        return tuple(range(heads))
    if options.method == "magnitude":
        sides = [
            *(_by_head(model, part, layout.width) for part in (layout.queries[0], layout.keys[0])),
            value,
        ]
        sizes = outputs.square().sum((1, 2)) + sum(side.square().sum((1, 2)) for side in sides)
        return tuple(sorted(sizes.topk(heads).indices.tolist()))
    (output,) = layout.outputs
    moments = Moments.zeros(outputs.shape[0] * outputs.shape[1], outputs.shape[2], value.device)
    for _, features, target in _features(model, name, calls, targets, options.rows):
        moments.add(torch.einsum("rjc,jcd->rjd", features.double(), value).flatten(1), target)
    return heads_to_keep(moments.centred() if _has_bias(model, output) else moments, outputs, heads)


# --- fitting ------------------------------------------------------------------------------------------------


def _fit_values_and_output(
    model: nn.Module, name: str, seen: Features, value: Tensor, outputs: Tensor, groups: Round, rounds: int
) -> tuple[float, float]:
    """Fit values and the one output layer of a block whose queries and keys are there already."""
    layout = head_layout(model, name)
    (output,) = layout.outputs
    heads, inputs = len(groups), value.shape[1]
    bases = own = None
    if heads * inputs > _WIDEST:
        own = _own_grams(seen, value.new_zeros(heads, inputs, inputs), rows=4 * inputs)
        bases = value_bases(merge_values(value, outputs, groups, own, _WIDEST // heads)[0], own.sum(0))
        inputs = bases.shape[2]
    moments = Moments.zeros(heads * inputs, outputs.shape[2], value.device)
    for _, features, target in seen():
        if bases is not None:
            features = torch.einsum("rjc,jck->rjk", features, bases.to(features))
        moments.add(features.flatten(1), target)
    fitted = moments.centred() if _has_bias(model, output) else moments
    blocks = fitted.gram.unflatten(0, (heads, inputs)).unflatten(2, (heads, inputs))
    if own is None:
        own = torch.stack([blocks[j, :, j] for j in range(heads)])
    values, merged = merge_values(value, outputs, groups, own, layout.width)
    if bases is not None:  # they hold what a smaller rank is closest by, too
        values = bases.mT @ values
    started = fitted.loss((values @ merged).flatten(0, 1))
    values, merged, _ = refit_heads(fitted, values, merged, rounds)
    circuits = (values @ merged).flatten(0, 1)
    _write_values(model, name, values if bases is None else bases @ values)
    _write_output(model, output, merged.flatten(0, 1), moments.constant(circuits))
    return started / float(fitted.energy), fitted.loss(circuits) / float(fitted.energy)


def _fit_outputs(
    model: nn.Module, name: str, seen: Features, value: Tensor, outputs: Tensor, groups: Round
) -> tuple[float, float]:
    """Merge the values of a block whose queries and keys are there already, and fit each of its output layers."""
    (fit,) = _output_fits(model, name, seen, value, outputs, [(groups, tuple(range(len(groups))))])
    weights, *lost = fit.solve(model)
    _write_values(model, name, fit.values)
    for part, weight in weights.items():
        _write_output(model, part, weight, fit.moments[part].constant(weight))
    return lost[0], lost[1]


@dataclass(slots=True)
class _OutputFit:
    """A merge whose output layers are to be fitted.

    Attributes:
        values: of the merged heads, (G', c, d).
        merged: output weights of all streams to start from, (N, d, C).
        moments: of what the heads attend to, by columns of an output layer.
    """

    values: Tensor
    merged: Tensor
    moments: dict[Slice, Moments]

    def solve(self, model: nn.Module) -> tuple[dict[Slice, Tensor], float, float]:
        """The weight of each output layer (N·d, C), and what was lost before the fit and after."""
        started = lost = energy = 0.0
        weights: dict[Slice, Tensor] = {}
        parts = self.merged.flatten(0, 1).split([each.cross.shape[1] for each in self.moments.values()], 1)
        for (part, moments), before in zip(self.moments.items(), parts, strict=True):
            fitted = moments.centred() if _has_bias(model, part) else moments
            gram = fitted.gram.clone()
            gram.diagonal().add_(ridge(gram, RIDGE))
            weights[part] = solve(gram, fitted.cross)
            started, lost = started + fitted.loss(before), lost + fitted.loss(weights[part])
            energy += float(fitted.energy)
        return weights, started / energy, lost / energy


def _output_fits(
    model: nn.Module, name: str, seen: Features, value: Tensor, outputs: Tensor, merges: Sequence[Merge]
) -> list[_OutputFit]:
    """Of each merge the merged values and the moments of what they make of the features."""
    layout, inputs = head_layout(model, name), value.shape[1]
    width = layout.width
    own = _own_grams(seen, value.new_zeros(layout.heads, inputs, inputs))
    fits = []
    for groups, selected in merges:
        sharing = len(groups) // key_value_counts(layout.heads, layout.key_value_heads)[len(groups)]
        values, merged = merge_values(value, outputs, groups, own[list(selected)], width, sharing)
        moments = {
            part: Moments.zeros(len(groups) * width, len(_columns(model, part)), value.device)
            for part in layout.outputs
        }
        fits.append(_OutputFit(values, merged, moments))
    by_layer = {part.layer: part for part in layout.outputs}
    for path, features, target in seen():
        for fit, (groups, selected) in zip(fits, merges, strict=True):
            values = fit.values.repeat_interleave(len(groups) // len(fit.values), 0)
            mixed = torch.einsum("rjc,jcd->rjd", features[:, list(selected)].double(), values)
            fit.moments[by_layer[path]].add(mixed.flatten(1), target)
    return fits


def _own_grams(seen: Features, own: Tensor, rows: float = math.inf) -> Tensor:
    """F_jᵀF_j of each head from so many rows or a few more, added to zeros (heads, c, c), float64."""
    for _, features, _ in seen():
        by_head = features.transpose(0, 1).double()
        own.baddbmm_(by_head.mT, by_head)
        rows -= len(features)
        if rows <= 0:
            break
    return own


def _fit_norms(
    model: nn.Module, name: str, layout: HeadLayout, selected: Tensor, calls: Sequence[Call]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each norm over all heads the factor and the shift, (n,), that bring it back once these heads alone stay."""
    channels = norms_over_heads(layout, *kept_channels(layout, selected, name))
    moments: dict[str, ChannelMoments] = {}
    with ExitStack() as stack:
        for path, kept in channels.items():
            norm: Any = model.get_submodule(path)
            kept = kept.to(norm.weight.device)
            smaller = copy.deepcopy(norm)
            cut_norm(smaller, kept)
            moments[path] = ChannelMoments.zeros(len(kept), kept.device)

            def add(
                _: nn.Module,
                args: tuple[Tensor, ...],
                output: Tensor,
                smaller: nn.Module = smaller,
                kept: Tensor = kept,
                into: ChannelMoments = moments[path],
            ) -> None:
                into.add(smaller(args[0][..., kept]), output[..., kept])

            stack.enter_context(norm.register_forward_hook(add))
        for call in calls if channels else ():
            model.get_submodule(name)(*call.args, **call.kwargs)
    return {
        path: each.line() if _has_shift(model.get_submodule(path)) else (each.factor(), 0 * each.x)
        for path, each in moments.items()
    }


# --- passes over the calls ----------------------------------------------------------------------------------


def _runs(
    model: nn.Module, name: str, calls: Sequence[Call]
) -> Iterator[tuple[dict[str, AttentionRecord], dict[str, Tensor]]]:
    """The block's records of each call by suffix, and the inputs (B, tokens, c) of its layers by path; what the block
    puts out is not looked at."""
    module: Any = model.get_submodule(name)
    layers = {part.layer for part in head_layout(model, name).inputs}
    inputs: dict[str, Tensor] = {}

    def keep(layer: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[layer] = args[0]

    with ExitStack() as stack:
        capture = stack.enter_context(AttentionCapture(model, [name]))
        for layer in layers:
            hook = model.get_submodule(layer).register_forward_pre_hook(partial(keep, layer))
            stack.enter_context(hook)
        for call in calls:
            with _WithoutKernel():
                module(*call.args, **call.kwargs)
            yield {key.removeprefix(name): record for key, record in capture.records.items()}, dict(inputs)


class _WithoutKernel(TorchFunctionMode):
    """Context in which scaled dot-product attention, once it is noted, puts out zeros instead of taking its time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_zeros if func is scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _zeros(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    return query.new_zeros(*query.shape[:-1], value.shape[-1])


def _look(model: nn.Module, name: str, calls: Sequence[Call], factor: bool) -> Sights:
    """Run the block with all its heads."""
    layout = head_layout(model, name)
    device = _columns(model, layout.outputs[0]).device
    seen = Sights(torch.zeros(layout.heads, dtype=torch.float64, device=device), [])
    for records, inputs in _runs(model, name, calls):
        for record in records.values():
            weight = record.output_weight.detach().double().T.unflatten(0, (record.heads, -1))  # (M, d, C)
            grams = weight @ weight.mT
            for samples in _samples(record, record.key.shape[2]):
                maps = record.maps(samples=samples)
                seen.movements += head_movements(maps, record.value[samples].to(maps.dtype), grams)
        have = sum(len(record.query) for record in seen.records)
        wanted = min(_MATCHED_ON[0], -(-_MATCHED_ON[1] // records[MAIN].query.shape[2]))
        if have < wanted:
            seen.records.append(records[MAIN].of_samples(slice(wanted - have)))
        if factor:
            rows = [_with_one(model, part, inputs) for part in (layout.queries[0], layout.keys[0])]
            if seen.query_inputs is None or seen.key_inputs is None:
                seen.query_inputs, seen.key_inputs = (Moments.zeros(x.shape[-1], 1, device) for x in rows)
            for x, moments in zip(rows, (seen.query_inputs, seen.key_inputs), strict=True):
                moments.add(x.flatten(0, 1), x[..., :1].flatten(0, 1))
    return seen


def _plan(records: Sequence[AttentionRecord], layout: HeadLayout, heads: int, pairing: Pairing) -> Plan:
    sharing = layout.sharing
    key_values = key_value_counts(layout.heads, layout.key_value_heads)[heads]
    if pairing == "adjacent":
        shared = plan_sharing(layout.heads, sharing, heads, key_values)
        return plan_merges(layout.heads, heads) if sharing == 1 else shared
    batches = [(_map_stream(record), record.value.float()) for record in records]
    weight = records[0].output_weight.detach().float()
    if sharing == 1:
        return match_merges(batches, weight, heads)
    return merge_rounds(batches, weight, heads, sharing_pairs(sharing, heads, key_values))


def _merge(seen: Sights, layout: HeadLayout, heads: int, pairing: Pairing) -> Merge:
    groups = members(_plan(seen.records, layout, heads, pairing), layout.heads)
    if layout.sharing == 1:
        return groups, select_heads(groups, seen.movements)
    return select_sharing(groups, seen.movements, layout.sharing)


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
    outputs, values = head_layout(model, name).outputs, _values(model, name)
    streams, drawn = _streams(model, name), torch.Generator().manual_seed(0)
    for number, (records, inputs) in enumerate(_runs(model, name, calls)):
        made_from = [_with_one(model, part, inputs) for part in values]
        for output, suffixes in zip(outputs, streams, strict=True):
            of_stream = [records[suffix] for suffix in suffixes]
            parts = targets[output.layer][number].split([record.query.shape[2] for record in of_stream], 1)
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
                    yield output.layer, joined.flatten(0, 1), target[samples][:, index].flatten(0, 1)


def _samples(record: AttentionRecord, width: int, rows: int | None = None) -> list[slice]:
    """Samples that fit into memory together, with tensors of (heads, rows, width) each."""
    batch, heads, count, _ = record.query.shape
    return cut(batch, max(1, _AT_ONCE // (heads * (rows or count) * width)))


# --- weights ------------------------------------------------------------------------------------------------


def _with_one(model: nn.Module, part: Slice, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a layer's weight and bias multiply: its inputs, with a 1 where it has a bias."""
    x = inputs[part.layer]
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) if _has_bias(model, part) else x


def _has_bias(model: nn.Module, part: Slice) -> bool:
    return getattr(model.get_submodule(part.layer), "bias", None) is not None


def _has_shift(norm: nn.Module) -> bool:
    return getattr(norm, "bias", None) is not None


def _by_head(model: nn.Module, part: Slice, width: int) -> Tensor:
    """Rows of weight and bias as they multiply `_with_one` from the right, (heads, c, d), float64."""
    linear: Any = model.get_submodule(part.layer)
    parts = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
    return torch.cat(parts, 1)[part.indices].detach().double().unflatten(0, (-1, width)).mT


def _values_and_outputs(model: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Of each head W^V (M, c, d), and W^O of all streams side by side (M, d, C)."""
    layout = head_layout(model, name)
    value = torch.cat([_by_head(model, part, layout.width) for part in _values(model, name)], 1)
    outputs = [_columns(model, part).T.unflatten(0, (layout.heads, -1)) for part in layout.outputs]
    return value.repeat_interleave(layout.sharing, 0), torch.cat(outputs, 2)


def _columns(model: nn.Module, part: Slice) -> Tensor:
    """Columns of a weight, (C, heads·d), float64."""
    linear: Any = model.get_submodule(part.layer)
    weight: Tensor = linear.weight
    return weight[:, part.indices].detach().double()


def _write_head(model: nn.Module, part: Slice, head: int, weight: Tensor) -> None:
    """The rows of one head from what `_by_head` gives of it."""
    linear: Any = model.get_submodule(part.layer)
    start = part.start + head * weight.shape[1]
    rows = slice(start, start + weight.shape[1])
    linear.weight.data[rows] = weight[: linear.in_features].T.to(linear.weight)
    if linear.bias is not None:
        linear.bias.data[rows] = weight[-1].to(linear.bias)


def _write_values(model: nn.Module, name: str, values: Tensor) -> None:
    """Values of all heads that have some of their own (G, c, d), of all rows that make them one after the other."""
    parts = _values(model, name)
    layers: list[Any] = [model.get_submodule(part.layer) for part in parts]
    sizes = [layer.in_features + (layer.bias is not None) for layer in layers]
    for head, of_head in enumerate(values):
        for part, weight in zip(parts, of_head.split(sizes), strict=True):
            _write_head(model, part, head, weight)


def _write_output(model: nn.Module, part: Slice, weight: Tensor, constant: Tensor) -> None:
    """The columns of the heads, and the constant beside them."""
    linear: Any = model.get_submodule(part.layer)
    linear.weight.data[:, part.indices] = weight.T.to(linear.weight)
    if linear.bias is not None:
        linear.bias.data.copy_(constant)


def _scale_norm(norm: Any, factor: Tensor, shift: Tensor) -> None:
    norm.weight.data *= factor.to(norm.weight)
    if _has_shift(norm):
        norm.bias.data.mul_(factor.to(norm.bias)).add_(shift.to(norm.bias))


def _cut_mask(call: Call, heads: int, kept: Sequence[int]) -> None:
    """Leave a mask that differs by head, (B or 1, M, Q, K), only those of the heads that stay."""
    mask = call.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == heads:
        call.kwargs = {**call.kwargs, "attention_mask": mask[:, list(kept)]}
