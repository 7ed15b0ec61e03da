"""The weights with which a squeezed map mixes the teacher's maps: the central object of the method.

Whatever pairs, rounds and coefficients are chosen, a squeezed map is a convex combination of teacher maps:
`squeezed = weights @ maps`, each row of `weights` on the simplex. Maps come as a stream that each round walks
again, so no more than one chunk of them need exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shd_diffusion.squeezing.coefficients import Coefficient, closed_form, select, select_one
from shd_diffusion.squeezing.map_stream import MapStream, Part, part_of
from shd_diffusion.squeezing.plan import Group, Merge, Plan, check_merge, members
from shd_diffusion.squeezing.simplex import minimum_norm_weights
from shd_diffusion.squeezing.value_space import (
    deviation_gram,
    output_gram,
    pair_sums,
    pair_sums_by_row,
    side_by_side,
)

Granularity = Literal["sample", "row"]


@dataclass(frozen=True, slots=True)
class MergeStep:
    """Merges of one round that have the same shape, so that one batch of products serves them all.

    Attributes:
        inputs: P groups of the round's input heads, one a merge.
        parts: the teacher heads behind each of those inputs.
        gram: `output_gram` of each merge's teacher heads, (P, w, w).
    """

    inputs: tuple[Group, ...]
    parts: tuple[tuple[Group, ...], ...]
    gram: Tensor

    @property
    def heads(self) -> tuple[Group, ...]:
        """The teacher heads behind each merge."""
        return tuple(joined(parts) for parts in self.parts)


@dataclass(frozen=True, slots=True)
class Squeezer:
    """A plan made ready for one block of a frozen teacher: all that does not depend on the sample.

    Attributes:
        groups: the teacher heads behind each squeezed head.
        rounds: for each round its groups of input heads, and their merges by shape.
    """

    groups: tuple[Group, ...]
    rounds: tuple[tuple[tuple[Group, ...], tuple[MergeStep, ...]], ...]


def prepare_squeezer(
    plan: Plan, output_weight: Tensor, num_heads: int, merge: Merge = "progressive"
) -> Squeezer:
    """Compute the output weights' Gram matrices that the plan's merges need, once for a frozen teacher.

    Args:
        plan: the rounds of merges.
        output_weight: (C, M·d), as in `nn.Linear.weight`.
        num_heads: M.
        merge: `joint` merges each of the plan's final groups at once.

    Raises:
        ValueError: a progressive merge of more than two heads at once.
    """
    check_merge(plan, merge)
    final = members(plan, num_heads)
    behind: tuple[Group, ...] = tuple((head,) for head in range(num_heads))
    rounds = []
    for groups in (final,) if merge == "joint" and plan else plan:
        by_shape: dict[tuple[int, ...], list[Group]] = {}
        for group in groups:
            if len(group) > 1:
                by_shape.setdefault(tuple(len(behind[head]) for head in group), []).append(group)
        steps = tuple(merge_step(inputs, behind, output_weight) for inputs in by_shape.values())
        rounds.append((groups, steps))
        behind = tuple(joined(behind[head] for head in group) for group in groups)
    return Squeezer(final, tuple(rounds))


def merge_step(inputs: Sequence[Group], behind: Sequence[Group], output_weight: Tensor) -> MergeStep:
    """Merges of `inputs` (heads of one round), given the teacher heads behind each head of that round."""
    parts = tuple(tuple(behind[head] for head in group) for group in inputs)
    num_heads = sum(map(len, behind))
    return MergeStep(tuple(inputs), parts, output_gram(output_weight, [joined(p) for p in parts], num_heads))


def joined(parts: Iterable[Group]) -> Group:
    return tuple(head for part in parts for head in part)


def identity_weights(values: Tensor) -> Tensor:
    """Weights of the heads before any merge: (B, M, M, 1) for values (B, M, K, d)."""
    batch, heads = values.shape[:2]
    return torch.eye(heads, dtype=values.dtype, device=values.device).expand(batch, heads, heads)[..., None]


def mixing_weights(
    maps: MapStream,
    values: Tensor,
    squeezer: Squeezer,
    granularity: Granularity = "sample",
    coefficient: Coefficient = "closed_form",
) -> tuple[Tensor, Tensor]:
    """What each of the teacher's maps counts in each squeezed map: weights of maps, not of a model.

    Args:
        maps: the teacher's at temperature 1, (B, M, Q, K).
        values: V, (B, M, K, d).
        squeezer: from `prepare_squeezer`.
        granularity: one coefficient a sample and merge, or one a query row.
        coefficient: `closed_form`, or one of the ablations `mean` and `select`.

    Returns:
        The weights (B, N, M, R), with R = Q by row and else 1, and the shares (B, M - N, R) that each merge
        gives to its inputs, the last one's (1 - the others') left out: α, where pairs merge.
    """
    weights = identity_weights(values)
    coefficients = [values.new_empty(values.shape[0], 0, 1)]
    for groups, steps in squeezer.rounds:
        merged: dict[Group, Tensor] = {}
        for step in steps:
            shares = _shares(step, maps, values, weights, granularity == "row", coefficient)  # (B, P, n, R)
            inputs = torch.stack([weights[:, _span(heads)] for heads in zip(*step.inputs, strict=True)], 2)
            merged.update(zip(step.inputs, (shares[:, :, :, None] * inputs).sum(2).unbind(1), strict=True))
            coefficients.append(shares[:, :, :-1].flatten(1, 2))
        weights = merge_weights(weights, groups, merged)
    return weights, torch.cat(coefficients[1:] or coefficients, 1)


def merge_weights(weights: Tensor, groups: Sequence[Group], merged: Mapping[Group, Tensor]) -> Tensor:
    """Weights after a round: a group's merged ones (B, M, R), or those of the head that stays alone."""
    heads = [merged[group] if len(group) > 1 else weights[:, group[0]] for group in groups]
    return torch.stack(torch.broadcast_tensors(*heads), 1)


def _shares(
    step: MergeStep, maps: MapStream, values: Tensor, weights: Tensor, by_row: bool, coefficient: Coefficient
) -> Tensor:
    """Each input's share in its merge, (B, P, n, R): on the simplex."""
    count = len(step.inputs[0])
    if coefficient == "mean":
        return values.new_full((values.shape[0], len(step.inputs), count, 1), 1 / count)
    if count == 2:
        sums = merge_sums(step, maps, values, weights, by_row)
        alpha = closed_form(sums) if coefficient == "closed_form" else select(sums)
        return torch.stack([alpha, 1 - alpha], 2)
    gram = merge_grams(step, maps, values, by_row)
    return (minimum_norm_weights(gram) if coefficient == "closed_form" else select_one(gram)).mT


def merge_sums(step: MergeStep, maps: MapStream, values: Tensor, weights: Tensor, by_row: bool) -> Tensor:
    """`pair_sums` of a step's merges, (3, B, P, R)."""
    batch, _, rows, _ = maps.shape
    split = len(step.parts[0][0]) * values.shape[-1]
    if by_row:
        sums = values.new_empty(3, batch, len(step.inputs), rows)
        for (samples, some_rows), moved in _moved(step, maps, values, weights):
            sums[:, samples, :, some_rows] = pair_sums_by_row(moved, step.gram, split)
        return sums
    products = values.new_zeros(batch, *step.gram.shape)
    for (samples, _), moved in _moved(step, maps, values, weights):
        products[samples].add_(moved.mT @ moved)
    return pair_sums(products, step.gram, split)


def _moved(
    step: MergeStep, maps: MapStream, values: Tensor, weights: Tensor
) -> Iterator[tuple[Part, Tensor]]:
    """`D V` of a step's merges, (samples, P, rows, w), part by part."""
    beside = side_by_side(values, step.heads)
    inputs, parts = zip(*step.inputs, strict=True), zip(*step.parts, strict=True)
    first, second = (mixture(weights[:, heads], behind) for heads, behind in zip(inputs, parts, strict=True))
    for part, chunk in maps.walk():
        yield part, (first(part, chunk) - second(part, chunk)) @ beside[part[0]]


def merge_grams(step: MergeStep, maps: MapStream, values: Tensor, by_row: bool) -> Tensor:
    """`deviation_gram` of a step's merges of single heads, (B, P, R, n, n)."""
    batch, _, rows, _ = maps.shape
    beside = side_by_side(values, step.heads)
    heads = torch.tensor(step.heads, device=values.device)
    grams = values.new_zeros(batch, len(heads), rows if by_row else 1, heads.shape[1], heads.shape[1])
    for (samples, some_rows), chunk in maps.walk():
        into = grams[samples, :, some_rows] if by_row else grams[samples]
        into += deviation_gram(chunk[:, heads], beside[samples], step.gram, by_row)
    return grams


def mixture(weights: Tensor, groups: Sequence[Group]) -> Callable[[Part, Tensor], Tensor]:
    """`weights @ maps`, made ready to be applied to chunk after chunk.

    Args:
        weights: (B, P, M, Q or 1).
        groups: the heads whose weights are not zero, for each of P mixtures: each map is read once.

    Returns:
        A function of a chunk's part and maps (samples, M, rows, K) to (samples, P, rows, K).
    """
    sizes = sorted({len(group) for group in groups})
    if len(sizes) == 1:
        return _even_mixture(weights, groups)
    positions = [[index for index, group in enumerate(groups) if len(group) == size] for size in sizes]
    parts = [_even_mixture(weights[:, which], [groups[index] for index in which]) for which in positions]

    def mix(part: Part, maps: Tensor) -> Tensor:
        mixed = maps.new_empty(maps.shape[0], len(groups), *maps.shape[2:])
        for which, mix_these in zip(positions, parts, strict=True):
            mixed[:, _span(which)] = mix_these(part, maps)
        return mixed

    return mix


def _even_mixture(weights: Tensor, groups: Sequence[Group]) -> Callable[[Part, Tensor], Tensor]:
    """`mixture` of groups of equally many heads."""
    spans = [_span(heads) for heads in zip(*groups, strict=True)]
    if len(spans) == 1:
        return lambda part, maps: maps[:, spans[0]]
    columns = torch.tensor(groups, device=weights.device)[None, :, :, None].expand(
        weights.shape[0], -1, -1, weights.shape[3]
    )
    shares = weights.gather(2, columns).unbind(2)  # of each group's i-th head, (B, P, Q or 1)

    def mix(part: Part, maps: Tensor) -> Tensor:
        heads = [maps[:, span] for span in spans]
        by_head = [part_of(share, part)[..., None] for share in shares]
        if len(heads) == 2:  # weights sum to 1
            return torch.lerp(heads[1], heads[0], by_head[0])
        mixed = heads[0] * by_head[0]
        for head, share in zip(heads[1:], by_head[1:], strict=True):
            mixed.addcmul_(head, share)
        return mixed

    return mix


def _span(heads: Sequence[int]) -> slice | list[int]:
    """Evenly spaced heads as a slice, which selects without a copy."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if step > 0 and list(heads) == list(range(heads[0], heads[-1] + 1, step)):
        return slice(heads[0], heads[-1] + 1, step)
    return list(heads)
