"""What a merge loses, computed in value space (docs/method.md section 5).

With `X_h = V_h W_h`, inner products of contributions need no tensor as wide as the output:
`<D X_i, D X_j> = <(D V_i)^T (D V_j), W_i W_j^T>`. The right factor is fixed for a frozen teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shd_diffusion.squeezing.plan import Group


def output_gram(output_weight: Tensor, groups: Sequence[Group], num_heads: int) -> Tensor:
    """Gram matrices `W W^T` of the output projection's rows that belong to each group of heads.

    Args:
        output_weight: (C, M·d), as in `nn.Linear.weight`.
        groups: P groups of n heads each.
        num_heads: M.

    Returns:
        (P, n·d, n·d), float32 or better.
    """
    weight = output_weight.detach().to(torch.promote_types(output_weight.dtype, torch.float32))
    by_head = weight.unflatten(1, (num_heads, -1))  # (C, M, d)
    parts = [by_head[:, list(group)].flatten(1) for group in groups]  # (C, n·d) each
    return torch.stack([part.T @ part for part in parts])


def side_by_side(values: Tensor, groups: Sequence[Group]) -> Tensor:
    """The values of each group's heads next to each other: (B, M, K, d) to (B, P, K, n·d)."""
    heads = [head for group in groups for head in group]
    by_key = values.transpose(1, 2)  # (B, K, M, d)
    # Neighbouring heads lie side by side in what the model's projection returned: a view, no copy.
    adjacent = heads == list(range(heads[0], heads[0] + len(heads)))
    taken = by_key[:, :, heads[0] : heads[0] + len(heads)] if adjacent else by_key[:, :, heads]
    return taken.unflatten(2, (len(groups), -1)).flatten(3).transpose(1, 2)


def pair_sums(products: Tensor, gram: Tensor, split: int) -> Tensor:
    """The inner products that decide a merge of p and q (docs/method.md section 3), summed over the query rows.

    Args:
        products: `(D V)^T (D V)` with D = A_p - A_q and V = [V_p, V_q], (B, P, w, w).
        gram: the `output_gram` of p and q, (P, w, w).
        split: width of V_p.

    Returns:
        <D X_p, D X_p>, <D X_p, D X_q> and <D X_q, D X_q>, (3, B, P, 1).
    """
    weighed = products * gram
    first, second = weighed[..., :split, :], weighed[..., split:, split:]
    sums = [first[..., :split].sum((-2, -1)), first[..., split:].sum((-2, -1)), second.sum((-2, -1))]
    return torch.stack(sums)[..., None]


def pair_sums_by_row(moved: Tensor, gram: Tensor, split: int) -> Tensor:
    """The same for each query row, (3, B, P, rows), from `D V`, (B, P, rows, w)."""
    first, second = moved[..., :split], moved[..., split:]
    weighed = (first @ gram[:, :split]).mul_(moved)
    last = (second @ gram[:, split:, split:]).mul_(second).sum(-1)
    return torch.stack([weighed[..., :split].sum(-1), weighed[..., split:].sum(-1), last])


def deviation_gram(maps: Tensor, values: Tensor, gram: Tensor, by_row: bool) -> Tensor:
    """Gram matrices of r_i = O - A_i S, what n heads lose when all of them use the map of head i.

    Since weights sum to 1, the loss of any mixture of the maps is `|sum_i w_i r_i|^2`.

    Args:
        maps: A, (B, P, n, rows, K).
        values: [V_1, ..., V_n] side by side, (B, P, K, n·d).
        gram: their `output_gram`, (P, n·d, n·d).
        by_row: keep the query rows apart; else sum over them.

    Returns:
        (B, P, rows, n, n) by row, else (B, P, 1, n, n).
    """
    count = maps.shape[2]
    moved = maps @ values[:, :, None]  # A_i [V_1, ..., V_n], (B, P, n, rows, n·d)
    own = torch.cat([part[:, :, i] for i, part in enumerate(moved.chunk(count, dim=-1))], -1)
    deviation = own[:, :, None] - moved
    weighed = deviation @ gram[:, None]
    if by_row:
        return torch.einsum("bpirw,bpjrw->bprij", weighed, deviation)
    return (weighed.flatten(3) @ deviation.flatten(3).mT)[:, :, None]
