"""The weights with which a squeezed map mixes the teacher's maps: the central object of the method.

Whatever pairs, rounds and coefficients are chosen, a squeezed map is a convex combination of teacher maps:
`squeezed = weights @ maps`, each row of `weights` on the simplex. Maps come as a stream of chunks of query
rows that may be walked again for the next round, so no more than one chunk of maps need exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from shd_diffusion.squeezing.coefficients import Coefficient, closed_form, select
from shd_diffusion.squeezing.plan import Group, Plan, members
from shd_diffusion.squeezing.simplex import minimum_norm_weights
from shd_diffusion.squeezing.value_space import deviation_gram, output_gram, pair_sums, side_by_side

Granularity = Literal["sample", "row"]
Merge = Literal["progressive", "joint"]
Stream: TypeAlias = Callable[[], Iterable[Tensor]]
"""Yields the teacher's maps (B, M, rows, K), chunk after chunk of query rows, from the first row each time."""


@dataclass(frozen=True, slots=True)
class MergeStep:
    """Merges of one round that have the same shape, so that one batch of products serves them all.

    Attributes:
        inputs: the round's input heads that each of P merges takes.
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


def prepare(plan: Plan, output_weight: Tensor, num_heads: int, merge: Merge = "progressive") -> Squeezer:
    """Compute the output weights' Gram matrices that the plan's merges need, once for a frozen teacher.

    Args:
        plan: the rounds of merges.
        output_weight: (C, M·d), as in `nn.Linear.weight`.
        num_heads: M.
        merge: `joint` merges each of the plan's final groups at once.

    Raises:
        ValueError: a progressive merge of more than two heads at once.
    """
    final = members(plan, num_heads)
    behind: tuple[Group, ...] = tuple((head,) for head in range(num_heads))
    rounds = []
    for groups in (final,) if merge == "joint" and plan else plan:
        by_shape: dict[tuple[int, ...], list[Group]] = {}
        for group in groups:
            if merge == "progressive" and len(group) > 2:
                raise ValueError(
                    f"a progressive merge takes two heads, not {group}; merge='joint' takes more"
                )
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


def squeeze_weights(
    stream: Stream,
    values: Tensor,
    squeezer: Squeezer,
    granularity: Granularity = "sample",
    coefficient: Coefficient = "closed_form",
) -> tuple[Tensor, Tensor]:
    """Weights of the squeezed maps over the teacher's maps.

    Args:
        stream: the teacher's maps at temperature 1.
        values: V, (B, M, K, d).
        squeezer: from `prepare`.
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
            shares = _shares(step, stream, values, weights, granularity == "row", coefficient)  # (B, P, n, R)
            inputs = torch.stack([weights[:, list(group)] for group in step.inputs], 1)  # (B, P, n, M, R)
            merged.update(zip(step.inputs, (shares[:, :, :, None] * inputs).sum(2).unbind(1), strict=True))
            coefficients.append(shares[:, :, :-1].flatten(1, 2))
        heads = [merged[group] if len(group) > 1 else weights[:, group[0]] for group in groups]
        weights = torch.stack(torch.broadcast_tensors(*heads), 1)
    return weights, torch.cat(coefficients[1:] or coefficients, 1)


def _shares(
    step: MergeStep, stream: Stream, values: Tensor, weights: Tensor, by_row: bool, coefficient: Coefficient
) -> Tensor:
    """Each input's share in its merge, (B, P, n, R): on the simplex."""
    count = len(step.inputs[0])
    if coefficient == "mean":
        return values.new_full((values.shape[0], len(step.inputs), count, 1), 1 / count)
    if count == 2:
        sums = merge_sums(step, stream, values, weights, by_row)
        alpha = closed_form(sums) if coefficient == "closed_form" else select(sums)
        return torch.stack([alpha, 1 - alpha], 2)
    beside = side_by_side(values, step.heads)
    grams = [
        deviation_gram(
            torch.stack([maps[:, list(group)] for group in step.heads], 1), beside, step.gram, by_row
        )
        for maps in stream()
    ]
    gram = torch.cat(grams, 2) if by_row else torch.stack(grams).sum(0)
    if coefficient == "select":
        best = gram.diagonal(dim1=-2, dim2=-1).argmin(-1)
        return torch.nn.functional.one_hot(best, count).to(gram).mT
    return minimum_norm_weights(gram).mT


def merge_sums(step: MergeStep, stream: Stream, values: Tensor, weights: Tensor, by_row: bool) -> Tensor:
    """`pair_sums` of a step's merges over all chunks, (3, B, P, R)."""
    beside = side_by_side(values, step.heads)
    split = len(step.parts[0][0]) * values.shape[-1]
    firsts, seconds = zip(*step.inputs, strict=True)
    of_first, of_second = zip(*step.parts, strict=True)
    sums = []
    for maps, part in with_weights(stream(), weights):
        # D = A_p - A_q, each itself a mixture of teacher maps from the second round on
        difference = mix(maps, part[:, firsts], of_first) - mix(maps, part[:, seconds], of_second)
        sums.append(pair_sums(difference, beside, step.gram, split, by_row))
    return torch.cat(sums, -1) if by_row else torch.stack(sums).sum(0)


def with_weights(chunks: Iterable[Tensor], weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each chunk of maps (B, M, rows, K) with the weights (B, N, M, rows or 1) of its rows."""
    start = 0
    for maps in chunks:
        stop = start + maps.shape[2]
        yield maps, weights if weights.shape[-1] == 1 else weights[..., start:stop]
        start = stop


def apply_weights(maps: Tensor, weights: Tensor, groups: Sequence[Group]) -> Tensor:
    """`weights @ maps`: (B, M, rows, K) by (B, N, M, rows or 1) to (B, N, rows, K).

    `groups` names the heads whose weights are not zero, so that each teacher map is read once.
    """
    sizes = sorted({len(group) for group in groups})
    if len(sizes) == 1:
        return mix(maps, weights, groups)
    batch, _, rows, keys = maps.shape
    mixed = maps.new_empty(batch, len(groups), rows, keys)
    for size in sizes:
        positions = [index for index, group in enumerate(groups) if len(group) == size]
        part = mix(maps, weights[:, positions], [groups[index] for index in positions])
        mixed[:, _span(positions)] = part
    return mixed


def mix(maps: Tensor, weights: Tensor, groups: Sequence[Group]) -> Tensor:
    """Mixtures of P groups of equally many heads: maps (B, M, rows, K), weights (B, P, M, rows or 1)."""
    columns = list(zip(*groups, strict=True))
    parts = [maps[:, _span(heads)] for heads in columns]
    if len(parts) == 1:
        return parts[0]
    order = torch.arange(len(groups), device=maps.device)
    shares = [weights[:, order, torch.tensor(heads, device=maps.device), :, None] for heads in columns]
    if len(parts) == 2:  # weights sum to 1
        return torch.lerp(parts[1], parts[0], shares[0])
    mixed = parts[0] * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        mixed.addcmul_(part, share)
    return mixed


def _span(heads: Sequence[int]) -> slice | list[int]:
    """Evenly spaced heads as a slice, which selects without a copy."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if step > 0 and list(heads) == list(range(heads[0], heads[-1] + 1, step)):
        return slice(heads[0], heads[-1] + 1, step)
    return list(heads)
