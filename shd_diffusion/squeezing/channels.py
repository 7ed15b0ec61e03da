"""Fewer channels in a stream that many layers read (docs/method.md section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from shd_diffusion.squeezing.moments import RIDGE, Moments, ridge, solve


@dataclass(frozen=True, slots=True)
class Reader:
    """What a layer reads of a stream, and with which weights.

    Attributes:
        gram: of its inputs, about their mean where it has a bias, (p, p).
        weight: as it multiplies from the right, (p, C).
    """

    gram: Tensor
    weight: Tensor


def choose_channels(readers: Sequence[Reader], keep: int, groups: int = 1, strength: float = RIDGE) -> Tensor:
    """The channels whose loss harms the readers least, once each is refitted to read only those that stay.

    They leave one by one, by the optimal brain surgeon's rule (`remove_neurons`) summed over the readers: with
    G_l = Z_lᵀZ_l + λ_l, removing channel j adds |w_lj|² / (G_l⁻¹)_jj to the squared error of reader l, which counts in
    shares of what it puts out. What other channels tell of a channel is no loss.

    Args:
        readers: all that read the stream.
        keep: channels that stay.
        groups: so many groups of neighbours keep equally many each, as a group norm of the stream needs them.
        strength: λ over the mean of a Gram matrix's diagonal.

    Returns:
        (keep,), ascending.
    """
    grams = torch.stack([reader.gram for reader in readers]).double()
    weights = [reader.weight.double() for reader in readers]
    channels = grams.shape[1]
    products = torch.stack([weight @ weight.T for weight in weights])  # W Wᵀ, all that the rule needs of W
    products /= (products * grams).sum((1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    penalties = strength * grams.diagonal(dim1=1, dim2=2).mean(1)
    penalties = penalties.clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.linalg.inv(grams + penalties[:, None, None] * torch.eye(channels, device=grams.device))
    alive = torch.ones(channels, dtype=torch.bool, device=grams.device)
    for _ in range(channels - keep):
        losses = (products.diagonal(dim1=1, dim2=2) / inverse.diagonal(dim1=1, dim2=2)).sum(0)
        by_group = alive.view(groups, -1)
        may_leave = (by_group & (by_group.sum(1, keepdim=True) > keep // groups)).flatten()
        j = int(torch.where(may_leave, losses, torch.inf).argmin())
        alive[j] = False
        column, size = inverse[:, :, j].clone(), inverse[:, j, j].clone()
        step = column / size[:, None]
        row = products[:, j].clone()
        products -= step[:, :, None] * row[:, None] + row[:, :, None] * step[:, None]
        products += step[:, :, None] * step[:, None] * row[:, j, None, None]
        inverse -= step[:, :, None] * column[:, None]
    return alive.nonzero()[:, 0]


def place_channels(kept: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """An order of the kept channels in which the student's position embedding is closest to the teacher's.

    The order of a stream is free, its sinusoids are not: an assignment problem, solved exactly. What differs by a
    constant is none of it: a bias makes up for that.

    Args:
        kept: channels of the teacher's stream, (n,).
        teacher: its position embedding, (N, C).
        student: the student's, (N, n).

    Returns:
        The same channels, (n,), by place in the student's stream.
    """
    theirs, own = ((x - x.mean(0)).double().cpu() for x in (teacher[:, kept.to(teacher.device)], student))
    cost = (own.T[:, None] - theirs.T[None]).square().sum(2)
    _, order = linear_sum_assignment(cost.numpy())
    return kept[torch.as_tensor(order, device=kept.device)]


def refit_layer(moments: Moments, prior: Tensor, strength: float = RIDGE) -> Tensor:
    """The weights W that minimise |Y - Z W|² + λ |W - prior|², float64.

    Args:
        moments: of the layer's inputs Z and of what it should put out; centred where it has a bias.
        prior: (p, C).
        strength: λ over the mean of the Gram matrix's diagonal.
    """
    penalty = ridge(moments.gram, strength)
    gram = moments.gram.clone()
    gram.diagonal().add_(penalty)
    return solve(gram, moments.cross + penalty * prior.double())
