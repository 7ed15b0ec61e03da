"""One attention block with fewer heads, fitted on the calls of it that a walk through the model has brought."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.attention.blocks import kernel_calls
from shd_diffusion.attention.probe import MAIN
from shd_diffusion.compression.block_features import (
    attended_features,
    output_streams,
    records_and_inputs,
    samples_at_once,
)
from shd_diffusion.compression.head_fits import MergedHeads, fit_outputs, fit_values_and_output, output_fits
from shd_diffusion.compression.head_weights import (
    has_bias,
    has_shift,
    head_rows,
    output_columns,
    scale_norm,
    values_and_outputs,
    with_one,
    write_head,
)
from shd_diffusion.compression.lockstep import Call
from shd_diffusion.models.layouts import HeadLayout, head_layout
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
    ROUNDS,
    factor_queries_keys,
    head_movements,
    heads_to_keep,
    select_heads,
)
from shd_diffusion.squeezing.map_stream import MapStream, stream
from shd_diffusion.squeezing.matching import merge_rounds
from shd_diffusion.squeezing.moments import Moments
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

_MATCHED_ON = 64, 2**12  # samples on which pairs are found, and their query rows, at most


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
    query, key = (head_rows(model, part, width) for part in (layout.queries[0], layout.keys[0]))
    value, outputs = values_and_outputs(model, name)
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
        scale_norm(model.get_submodule(path), factor, shift)
    wider = options.head_dim or width
    if wider != width:
        widen_heads(model, name, wider)
    for call in calls:
        _cut_mask(call, before, selected)
    if seen.query_inputs is not None and seen.key_inputs is not None:
        layout = head_layout(model, name)
        grams = seen.query_inputs.gram, seen.key_inputs.centred().gram
        for j, group in enumerate(groups):
            moved = seen.movements[list(group)]
            moved = moved if moved.any() else torch.ones_like(moved)  # heads that put out nothing
            shares = moved / moved.sum()
            merged_query, merged_key = factor_queries_keys(
                query[list(group)], key[list(group)], shares, *grams, wider
            )
            # attention divides the logits by the root of the width
            write_head(model, layout.queries[0], j, merged_query * (wider / width) ** 0.5)
            write_head(model, layout.keys[0], j, merged_key)
            if bias is not None and table is not None:
                bias.table.data[:, j] = table[:, list(group)] @ shares.to(table)

    layout = head_layout(model, name)
    seen_again = partial(attended_features, model, name, calls, targets, options.rows)
    with_values = options.method == "merge" and len(layout.outputs) == 1 and layout.sharing == 1
    if with_values:
        lost = fit_values_and_output(model, name, seen_again, value, outputs, groups, options.rounds)
    else:
        lost = fit_outputs(model, name, seen_again, value, outputs, groups)
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
    value, outputs = values_and_outputs(model, name)
    seen = _look(model, name, calls, False)
    merges = [_merge(seen, layout, count, options.pairing) for count in counts]
    fits = output_fits(
        model,
        name,
        partial(attended_features, model, name, calls, targets, options.rows),
        value,
        outputs,
        merges,
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
    plain = len(layout.queries) == layout.sharing == 1 and output_streams(model, name) == ((MAIN,),)
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
            *(head_rows(model, part, layout.width) for part in (layout.queries[0], layout.keys[0])),
            value,
        ]
        sizes = outputs.square().sum((1, 2)) + sum(side.square().sum((1, 2)) for side in sides)
        return tuple(sorted(sizes.topk(heads).indices.tolist()))
    (output,) = layout.outputs
    moments = Moments.zeros(outputs.shape[0] * outputs.shape[1], outputs.shape[2], value.device)
    for _, features, target in attended_features(model, name, calls, targets, options.rows):
        moments.add(torch.einsum("rjc,jcd->rjd", features.double(), value).flatten(1), target)
    return heads_to_keep(moments.centred() if has_bias(model, output) else moments, outputs, heads)


# --- norms ------------------------------------------------------------------------------------------------


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
        path: each.line() if has_shift(model.get_submodule(path)) else (each.factor(), 0 * each.x)
        for path, each in moments.items()
    }


# --- passes over the calls ----------------------------------------------------------------------------------


def _look(model: nn.Module, name: str, calls: Sequence[Call], factor: bool) -> Sights:
    """Run the block with all its heads."""
    layout = head_layout(model, name)
    device = output_columns(model, layout.outputs[0]).device
    seen = Sights(torch.zeros(layout.heads, dtype=torch.float64, device=device), [])
    for records, inputs in records_and_inputs(model, name, calls):
        for record in records.values():
            weight = record.output_weight.detach().double().T.unflatten(0, (record.heads, -1))  # (M, d, C)
            grams = weight @ weight.mT
            for samples in samples_at_once(record, record.key.shape[2]):
                maps, counted = record.maps(samples=samples), record.some_counted(samples)
                seen.movements += head_movements(maps, record.value[samples].to(maps.dtype), grams, counted)
        have = sum(len(record.query) for record in seen.records)
        wanted = min(_MATCHED_ON[0], -(-_MATCHED_ON[1] // records[MAIN].query.shape[2]))
        if have < wanted:
            seen.records.append(records[MAIN].of_samples(slice(wanted - have)))
        if factor:
            rows = [with_one(model, part, inputs) for part in (layout.queries[0], layout.keys[0])]
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


def _merge(seen: Sights, layout: HeadLayout, heads: int, pairing: Pairing) -> MergedHeads:
    groups = members(_plan(seen.records, layout, heads, pairing), layout.heads)
    if layout.sharing == 1:
        return groups, select_heads(groups, seen.movements)
    return select_sharing(groups, seen.movements, layout.sharing)


def _map_stream(record: AttentionRecord) -> MapStream:
    batch, heads, rows, _ = record.query.shape
    shape = batch, heads, rows, record.key.shape[2]
    return stream(shape, lambda part: record.comparable_logits(1.0, *part), record.query.device)


def _cut_mask(call: Call, heads: int, kept: Sequence[int]) -> None:
    """Leave a mask that differs by head, (B or 1, M, Q, K), only those of the heads that stay."""
    mask = call.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == heads:
        call.kwargs = {**call.kwargs, "attention_mask": mask[:, list(kept)]}
