"""Fewer neurons in a feed-forward layer, by the optimal brain surgeon's rule (docs/method.md section 8).

Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon" (NIPS 1992); for whole rows of
a weight and with a layer's own least squares as the objective: OBS-Diff (arXiv 2510.06751).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shd_diffusion.squeezing.moments import RIDGE, Moments, ridge, solve

_TOGETHER = 128  # removals whose corrections are applied to the large matrices in one product


def remove_neurons(
    moments: Moments, weight: Tensor, keep: int, strength: float = RIDGE, fixed: int = 0
) -> tuple[Tensor, Tensor, list[float]]:
    """Remove neurons one by one, each time the one whose loss is least, and correct the others' weights.

    The objective |Y - Z W|² + λ |W - W_0|² first has all its weights W at their minimum. With G = ZᵀZ + λ, removing
    neuron j and refitting the others adds |w_j|² / (G⁻¹)_jj to it, and W -= (G⁻¹)_:j w_j / (G⁻¹)_jj is the refit.
    A gated unit is one neuron: its activation is the product of value and gate, and both leave with it.

    Args:
        moments: of the activations Z (T, n) and the layer's outputs Y (T, C); centred where the layer has a bias.
        weight: W_0, the layer's output weight as it multiplies from the right, (fixed + n, C).
        keep: neurons that stay, 1 to n; n returns the weights as they are.
        strength: λ over the mean of the Gram matrix's diagonal.
        fixed: so many features in front of the neurons go into the layer too, such as attended values. They stay, and
            their weights are fitted with the others.

    Returns:
        The features that stay (fixed + keep,), ascending; their weights (fixed + keep, C), float64; and the objective
        at the first minimum and after each removal, 1 + n - keep numbers.

    Raises:
        ValueError: `keep` is not between 1 and n.
    """
    features, neurons = len(weight), len(weight) - fixed
    if not 1 <= keep <= neurons:
        raise ValueError(f"{keep} of {neurons} neurons cannot be kept: 1 to {neurons} can")
    start = weight.double()
    if keep == neurons:
        return torch.arange(features, device=weight.device), start, [moments.loss(start)]
    penalty = ridge(moments.gram, strength)
    gram = moments.gram.clone()
    gram.diagonal().add_(penalty)
    cross = moments.cross + penalty * start
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weight = inverse @ cross
    change = weight - start
    objective = [moments.loss(weight) + penalty * float(change.square().sum())]

    # The weights themselves are not looked at until the end: K = W Wᵀ tells what a removal makes of every |w_i|².
    products = weight @ weight.T
    energies, diagonal = products.diagonal().clone(), inverse.diagonal().clone()  # |w_i|², (G⁻¹)_ii
    alive = torch.ones(features, dtype=torch.bool, device=weight.device)
    may_leave = torch.arange(features, device=weight.device) >= fixed
    for done in range(0, neurons - keep, _TOGETHER):
        count = min(_TOGETHER, neurons - keep - done)
        # Since the last product: G⁻¹ is inverse - U Uᵀ and K is products - U Pᵀ - P Uᵀ.
        u, p = inverse.new_zeros(2, features, count)
        for k in range(count):
            losses = torch.where(alive & may_leave, energies / diagonal, torch.inf)
            j = int(losses.argmin())
            objective.append(objective[-1] + float(losses[j]))
            alive[j] = False
            column = inverse[j] - u @ u[j]
            scale = column[j].rsqrt()
            # W -= column w_jᵀ / (G⁻¹)_jj, so K -= u vᵀ + v uᵀ - u uᵀ |w_j|² / (G⁻¹)_jj with v = W w_j and u = column,
            # each over the root of (G⁻¹)_jj
            moved = (products[j] - u @ p[j] - p @ u[j]) * scale
            column = column * scale
            u[:, k], p[:, k] = column, moved - column * (losses[j] / 2)
            energies -= 2 * column * p[:, k]
            diagonal -= column.square()
        inverse.addmm_(u, u.T, alpha=-1)
        products.addmm_(u, p.T, alpha=-1).addmm_(p, u.T, alpha=-1)
    kept = alive.nonzero()[:, 0]
    # Solved anew, without the rounding of many corrections.
    return kept, solve(gram[kept][:, kept], cross[kept]), objective
