"""Values and output layers of heads whose queries and keys are there already, fitted by least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from shd_diffusion.compression.block_features import Features
from shd_diffusion.compression.head_weights import has_bias, output_columns, write_output, write_values
from shd_diffusion.models.layouts import Slice, head_layout
from shd_diffusion.squeezing.heads import merge_values, refit_heads, value_bases
from shd_diffusion.squeezing.moments import RIDGE, Moments, ridge, share, solve
from shd_diffusion.squeezing.plan import Round
from shd_diffusion.squeezing.shared_keys import key_value_counts

MergedHeads: TypeAlias = tuple[Round, tuple[int, ...]]
"""Groups of heads, and of each group the head whose map it takes."""

_WIDEST = 2**11  # features of all heads; beyond it values are looked for in fewer directions


def fit_values_and_output(
    model: nn.Module, name: str, seen: Features, value: Tensor, outputs: Tensor, groups: Round, rounds: int
) -> tuple[float, float]:
    """Fit values and the one output layer of a block in turn, in place; its queries and keys are there already.

    Args:
        model: the model around the block.
        name: module path of the block.
        seen: what its N heads attend to.
        value: of the block's M heads as they were, (M, c, d).
        outputs: the same of their output weights, (M, d, C).
        groups: the heads behind each that stays.
        rounds: of the refit.

    Returns:
        |error|² / |target|², about the means, of the merged heads and of the fitted ones.
    """
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
    fitted = moments.centred() if has_bias(model, output) else moments
    blocks = fitted.gram.unflatten(0, (heads, inputs)).unflatten(2, (heads, inputs))
    if own is None:
        own = torch.stack([blocks[j, :, j] for j in range(heads)])
    values, merged = merge_values(value, outputs, groups, own, layout.width)
    if bases is not None:  # they hold what a smaller rank is closest by, too
        values = bases.mT @ values
    started = fitted.loss((values @ merged).flatten(0, 1))
    values, merged, _ = refit_heads(fitted, values, merged, rounds)
    circuits = (values @ merged).flatten(0, 1)
    write_values(model, name, values if bases is None else bases @ values)
    write_output(model, output, merged.flatten(0, 1), moments.constant(circuits))
    return share(started, fitted.energy), share(fitted.loss(circuits), fitted.energy)


def fit_outputs(
    model: nn.Module, name: str, seen: Features, value: Tensor, outputs: Tensor, groups: Round
) -> tuple[float, float]:
    """Merge the values of a block and fit each of its output layers, in place; see `fit_values_and_output`."""
    (fit,) = output_fits(model, name, seen, value, outputs, [(groups, tuple(range(len(groups))))])
    weights, *lost = fit.solve(model)
    write_values(model, name, fit.values)
    for part, weight in weights.items():
        write_output(model, part, weight, fit.moments[part].constant(weight))
    return lost[0], lost[1]


@dataclass(slots=True)
class OutputFit:
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
            fitted = moments.centred() if has_bias(model, part) else moments
            gram = fitted.gram.clone()
            gram.diagonal().add_(ridge(gram, RIDGE))
            weights[part] = solve(gram, fitted.cross)
            started, lost = started + fitted.loss(before), lost + fitted.loss(weights[part])
            energy += float(fitted.energy)
        return weights, share(started, energy), share(lost, energy)


def output_fits(
    model: nn.Module, name: str, seen: Features, value: Tensor, outputs: Tensor, merges: Sequence[MergedHeads]
) -> list[OutputFit]:
    """Of each merge the merged values and the moments of what they make of the features of the block's heads.

    The block stays as it is; see `fit_values_and_output`.
    """
    layout, inputs = head_layout(model, name), value.shape[1]
    width = layout.width
    own = _own_grams(seen, value.new_zeros(layout.heads, inputs, inputs))
    fits = []
    for groups, selected in merges:
        sharing = len(groups) // key_value_counts(layout.heads, layout.key_value_heads)[len(groups)]
        values, merged = merge_values(value, outputs, groups, own[list(selected)], width, sharing)
        moments = {
            part: Moments.zeros(len(groups) * width, len(output_columns(model, part)), value.device)
            for part in layout.outputs
        }
        fits.append(OutputFit(values, merged, moments))
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
