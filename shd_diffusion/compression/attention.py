"""One attention block with fewer heads, fitted on the calls of it that a walk through the model has brought."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.attention.blocks import MAIN, streams
from shd_diffusion.compression.lockstep import Call
from shd_diffusion.models.squeezed import check_heads_can_be_cut, cut_heads, output_layers
from shd_diffusion.squeezing import match_merges, plan_merges
from shd_diffusion.squeezing.chunks import MapStream, cut, stream
from shd_diffusion.squeezing.heads import (
    factor_queries_keys,
    head_movements,
    merge_values,
    refit_heads,
    select_heads,
)
from shd_diffusion.squeezing.moments import Moments
from shd_diffusion.squeezing.plan import Plan, members

Pairing = Literal["adjacent", "matched"]
Queries = Literal["select", "factor"]

_LAYERS = ("to_q", "to_k", "to_v")
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
    """

    pairing: Pairing = "matched"
    queries: Queries = "select"
    rounds: int = 4
    rows: int | None = None


@dataclass(slots=True)
class Sights:
    """What the block with all its heads showed on the calls.

    Attributes:
        movements: `head_movements`, (M,).
        records: of the first samples.
        query_inputs: moments of [H_Q, 1] (targets unused), for `factor`.
        key_inputs: moments of H_K.
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
    targets: Sequence[Tensor],
    options: HeadOptions,
) -> tuple[float, float]:
    """Leave an attention block so many heads, as close to the targets as least squares brings them, in place.

    Args:
        model: the model around the block.
        name: module path of the block, which is self- or cross-attention.
        heads: N, fewer than the block's M.
        calls: the block's calls with the calibration batches; a mask by head is cut with the heads.
        targets: what the output projection should put out in each call, (B, Q, C).
        options: how.

    Returns:
        |error|² / |target|², about the means, where the refit starts and where it ends.

    Raises:
        ValueError: the block is of a kind that cannot be squeezed.
    """
    check_can_be_squeezed(model, name, options.queries)
    module: Any = model.get_submodule(name)
    (output,) = output_layers(module).values()
    before, width = module.heads, module.inner_dim // module.heads
    query, key, value = (_by_head(getattr(module, layer), before) for layer in _LAYERS)
    outputs = output.weight.detach().T.unflatten(0, (before, -1)).double()  # W^O, (M, d, C)

    seen = _look(model, name, calls, outputs, options.queries == "factor")
    groups = members(_plan(seen.records, heads, options.pairing), before)
    selected = select_heads(groups, seen.movements)
    cut_heads(model, name, torch.tensor(selected))
    for call in calls:
        _cut_mask(call, before, selected)
    if seen.query_inputs is not None and seen.key_inputs is not None:
        grams = seen.query_inputs.gram, seen.key_inputs.centred().gram
        for j, group in enumerate(groups):
            shares = seen.movements[list(group)] / seen.movements[list(group)].sum()
            merged = factor_queries_keys(query[list(group)], key[list(group), :-1], shares, *grams, width)
            _write_head(module.to_q, j, merged[0])
            _write_head(module.to_k, j, torch.cat([merged[1], merged[1].new_zeros(1, width)]))

    moments = _moments(model, name, calls, targets, options.rows)
    fitted = moments if output.bias is None else moments.centred()
    inputs = value.shape[1] - 1
    blocks = fitted.gram.unflatten(0, (heads, inputs)).unflatten(2, (heads, inputs))
    own = torch.stack([blocks[j, :, j] for j in range(heads)])
    values, outputs = merge_values(value[:, :-1], outputs, groups, own, width)
    started = fitted.loss((values @ outputs).flatten(0, 1))
    values, outputs, _ = refit_heads(fitted, values, outputs, options.rounds)

    circuits = (values @ outputs).flatten(0, 1)
    for j in range(heads):
        _write_head(module.to_v, j, torch.cat([values[j], values.new_zeros(1, width)]))
    output.weight.data.copy_(outputs.flatten(0, 1).T)
    if output.bias is not None:
        # What the values' biases add is the same for every query: it is in here.
        output.bias.data.copy_(moments.constant(circuits))
    energy = float(fitted.energy)
    return started / energy, fitted.loss(circuits) / energy


def check_can_be_squeezed(model: nn.Module, name: str, queries: Queries = "select") -> None:
    """Raise ValueError unless the heads of that block can be squeezed so."""
    check_heads_can_be_cut(model, name)
    module: Any = model.get_submodule(name)
    if streams(module) != (MAIN,) or getattr(module, "add_k_proj", None) is not None:
        raise ValueError(f"attention block `{name}` joins two streams, whose heads cannot be squeezed yet")
    if queries == "factor" and getattr(module, "norm_q", None) is not None:
        raise ValueError(
            f"attention block `{name}` normalises its queries; take `select` instead of `factor`"
        )


# --- passes over the calls ----------------------------------------------------------------------------------


def _runs(
    model: nn.Module, name: str, calls: Sequence[Call]
) -> Iterator[tuple[AttentionRecord, dict[str, Tensor]]]:
    """The block's record of each call, and the inputs (B, tokens, c) of its projections by their names."""
    module: Any = model.get_submodule(name)
    inputs: dict[str, Tensor] = {}

    def keep(layer: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[layer] = args[0]

    with ExitStack() as stack:
        capture = stack.enter_context(AttentionCapture(model, [name]))
        for layer in _LAYERS:
            handle = getattr(module, layer).register_forward_pre_hook(partial(keep, layer))
            stack.enter_context(handle)
        for call in calls:
            module(*call.args, **call.kwargs)
            yield capture.records[name], dict(inputs)


def _look(model: nn.Module, name: str, calls: Sequence[Call], outputs: Tensor, factor: bool) -> Sights:
    """Run the block with all its heads."""
    module: Any = model.get_submodule(name)
    grams = outputs @ outputs.mT
    seen = Sights(torch.zeros(len(outputs), dtype=torch.float64, device=outputs.device), [])
    for record, inputs in _runs(model, name, calls):
        for samples in _samples(record, record.key.shape[2]):
            part = record.of_samples(samples)
            seen.movements += head_movements(part.maps(), part.value.to(part.maps().dtype), grams)
        have = sum(len(each.query) for each in seen.records)
        if have < _MATCHED_ON:
            seen.records.append(record.of_samples(slice(_MATCHED_ON - have)))
        if factor:
            if seen.query_inputs is None or seen.key_inputs is None:
                width = module.to_q.in_features, module.to_k.in_features
                seen.query_inputs = Moments.zeros(width[0] + 1, 1, outputs.device)
                seen.key_inputs = Moments.zeros(width[1], 1, outputs.device)
            queries, keys = inputs["to_q"].flatten(0, 1), inputs["to_k"].flatten(0, 1)
            seen.query_inputs.add(_with_one(queries), queries[:, :1])
            seen.key_inputs.add(keys, keys[:, :1])
    return seen


def _plan(records: Sequence[AttentionRecord], heads: int, pairing: Pairing) -> Plan:
    if pairing == "adjacent":
        return plan_merges(records[0].heads, heads)
    batches = [(_map_stream(record), record.value.float()) for record in records]
    return match_merges(batches, records[0].output_weight.detach().float(), heads)


def _map_stream(record: AttentionRecord) -> MapStream:
    batch, heads, rows, _ = record.query.shape
    shape = batch, heads, rows, record.key.shape[2]
    return stream(shape, lambda part: record.of_samples(part[0]).logits(rows=part[1]), record.query.device)


def _moments(
    model: nn.Module, name: str, calls: Sequence[Call], targets: Sequence[Tensor], rows: int | None
) -> Moments:
    """Moments of the features F_j = A'_j H of all heads side by side, and the targets."""
    module: Any = model.get_submodule(name)
    moments = Moments.zeros(module.heads * module.to_v.in_features, targets[0].shape[-1], targets[0].device)
    drawn = torch.Generator().manual_seed(0)
    for (record, inputs), target in zip(_runs(model, name, calls), targets, strict=True):
        count = record.query.shape[2]
        index = None if rows is None or rows >= count else torch.randperm(count, generator=drawn)[:rows]
        wanted = target if index is None else target[:, index.to(target.device)]
        for samples in _samples(record, max(record.key.shape[2], module.to_v.in_features)):
            maps = record.of_samples(samples).maps(rows=None if index is None else index.to(target.device))
            features = maps @ inputs["to_v"][samples, None].to(maps.dtype)  # (B, N, Q, c)
            moments.add(features.transpose(1, 2).flatten(2).flatten(0, 1), wanted[samples].flatten(0, 1))
    return moments


def _samples(record: AttentionRecord, width: int) -> list[slice]:
    """Samples that fit into memory together, with tensors of (heads, Q, width) each."""
    batch, heads, rows, _ = record.query.shape
    return cut(batch, max(1, _AT_ONCE // (heads * rows * width)))


# --- weights ------------------------------------------------------------------------------------------------


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def _by_head(linear: nn.Linear, heads: int) -> Tensor:
    """A projection's weight and bias as they multiply [H, 1] from the right, (heads, c + 1, d), float64."""
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    both = torch.cat([linear.weight, bias[:, None]], 1).detach().double()
    return both.unflatten(0, (heads, -1)).mT


def _write_head(linear: nn.Linear, head: int, weight: Tensor) -> None:
    """Set the rows of one head from (c + 1, d)."""
    rows = slice(head * weight.shape[1], (head + 1) * weight.shape[1])
    linear.weight.data[rows] = weight[:-1].T.to(linear.weight)
    if linear.bias is not None:
        linear.bias.data[rows] = weight[-1].to(linear.bias)


def _cut_mask(call: Call, heads: int, kept: Sequence[int]) -> None:
    """Leave a mask that differs by head, (B or 1, M, Q, K), only those of the heads that stay."""
    mask = call.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == heads:
        call.kwargs = {**call.kwargs, "attention_mask": mask[:, list(kept)]}
