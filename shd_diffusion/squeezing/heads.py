"""M heads into N by least squares on the weights (docs/method.md section 8).

A head j of the smaller block attends with a map A'_j of its own and adds A'_j H W^V_j W^O_j to the output, with H the
inputs of the keys and values. For fixed maps this is a regression of the teacher's output Y on the features
F_j = A'_j H with weights P_j = W^V_j W^O_j of rank d, and all that it needs are the moments of F and Y.

Value and output weights are held as they multiply from the right: V_j (c, d) and O_j (d, C), P_j = V_j O_j.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shd_diffusion.squeezing.moments import RIDGE, Moments, inverse_root, ridge, solve
from shd_diffusion.squeezing.plan import Group, Round

ROUNDS = 8


def head_movements(maps: Tensor, values: Tensor, grams: Tensor, counted: Tensor | None = None) -> Tensor:
    """How much each head moves the output: |A_h X_h - its mean over the queries|², summed over samples.

    Args:
        maps: A, (B, M, Q, K).
        values: V, (B, M, K, d).
        grams: W_h W_hᵀ of the heads' output weights W_h (d, C), (M, d, d).
        counted: which queries count, (B, Q); None where all do.

    Returns:
        (M,), float64.
    """
    attended = maps @ values  # A_h V_h, (B, M, Q, d)
    if counted is None:
        counted = attended.new_ones(len(maps), maps.shape[-2], dtype=torch.bool)
    rows = counted[:, None, :, None]
    mean = (attended * rows).sum(-2, keepdim=True) / rows.sum(-2, keepdim=True).clamp_min(1)
    centred = ((attended - mean) * rows).double()
    products = (centred.mT @ centred).sum(0)
    return (products * grams.to(products)).sum((-2, -1))


def select_heads(groups: Round, movements: Tensor) -> tuple[int, ...]:
    """`select`: of each group the head that moves the output most, whose queries and keys the merged head keeps.

    It leaves rotary embeddings and normalised queries and keys valid.
    """
    return tuple(max(group, key=lambda head: float(movements[head])) for group in groups)


def heads_to_keep(moments: Moments, outputs: Tensor, keep: int, strength: float = RIDGE) -> tuple[int, ...]:
    """Heads that stay where heads are dropped instead of merged: OBS-Diff (arXiv 2510.06751), a baseline.

    The block optimal brain surgeon on the output weight: with G = ZᵀZ + λ over the attended values Z_h = A_h V_h of all
    heads, dropping head h and refitting the others' output weights adds tr(W_hᵀ ((G⁻¹)_hh)⁻¹ W_h) to the loss. Heads
    leave one by one, each time the one for which that is least.

    Args:
        moments: of the attended values of M heads side by side, (T, M·d), and the block's output (T, C); centred where
            the output layer has a bias.
        outputs: W^O, (M, d, C).
        keep: heads that stay, 1 to M.
        strength: λ over the mean of the Gram matrix's diagonal.

    Returns:
        `keep` heads, ascending.
    """
    heads, width, _ = outputs.shape
    gram = moments.gram.clone()
    gram.diagonal().add_(ridge(gram, strength))
    inverse = torch.linalg.inv(gram)
    weight = inverse @ moments.cross
    alive = list(range(heads))

    def rows(head: int) -> slice:
        return slice(head * width, (head + 1) * width)

    while len(alive) > keep:
        own = [weight[rows(h)] for h in alive]
        corrections = [
            torch.linalg.solve(inverse[rows(h), rows(h)], w) for h, w in zip(alive, own, strict=True)
        ]
        losses = [float((w * c).sum()) for w, c in zip(own, corrections, strict=True)]
        least = min(range(len(alive)), key=losses.__getitem__)
        gone = rows(alive.pop(least))
        columns = inverse[:, gone]
        weight = weight - columns @ corrections[least]
        inverse = inverse - columns @ torch.linalg.solve(inverse[gone, gone], columns.T)
    return tuple(alive)


def factor_queries_keys(
    queries: Tensor,
    keys: Tensor,
    shares: Tensor,
    query_gram: Tensor,
    key_gram: Tensor,
    width: int,
) -> tuple[Tensor, Tensor]:
    """`factor`: the logits Σ_h w_h W^Q_h W^K_hᵀ of a group as one head of `width`, closest in the inputs' metric.

    The rank-d minimiser of |R_q (M - Q Kᵀ) R_k|, R the roots of the Gram matrices: the SVD of R_q M R_k, computed in
    the span of the group's weights. Only for blocks without rotary embeddings and without normalised queries and keys.

    Args:
        queries: W^Q_h of g heads as they multiply from the right, (g, c, d).
        keys: W^K_h, (g, c', d).
        shares: w, (g,).
        query_gram: of the queries' inputs, (c, c).
        key_gram: of the keys' inputs about their mean, (c', c'); what all keys share no softmax sees.
        width: of the merged head.

    Returns:
        (c, width) and (c', width), float64; zeros fill what the rank leaves over.
    """
    a = (queries.double() * shares.double()[:, None, None]).transpose(0, 1).flatten(1)  # (c, g·d)
    b = keys.double().transpose(0, 1).flatten(1)  # (c', g·d), M = a bᵀ
    root_a, root_b = inverse_root(a.T @ query_gram @ a), inverse_root(b.T @ key_gram @ b)
    # R_q a root_a and R_k b root_b have orthonormal columns, so the SVD of M in the metric is that of the core.
    core = root_a.T @ (a.T @ query_gram @ a) @ (b.T @ key_gram @ b) @ root_b
    left, sizes, right = torch.linalg.svd(core, full_matrices=False)
    rank = min(width, len(sizes))
    halves = sizes[:rank].sqrt()
    merged = a @ (root_a @ (left[:, :rank] * halves)), b @ (root_b @ (right[:rank].T * halves))
    found_queries, found_keys = (torch.nn.functional.pad(each, (0, width - rank)) for each in merged)
    return found_queries, found_keys


def merge_values(
    values: Tensor, outputs: Tensor, groups: Sequence[Group], grams: Tensor, width: int, sharing: int = 1
) -> tuple[Tensor, Tensor]:
    """Where the refit starts: rank-d factors of Σ_h W^V_h W^O_h over each group, closest in a metric of its own.

    The minimiser of |R_j (M_j - V_j O_j)|, R_j the root of the Gram matrix: O_j spans the first right singular vectors
    of R_j M_j. Where several merged heads share V_j, the matrices M_j stand side by side, and so do the O_j; the metric
    is that of all their features.

    Args:
        values: W^V of the teacher's heads as they multiply from the right, (M, c, d).
        outputs: W^O, (M, d, C).
        groups: N groups of heads.
        grams: of what each merged head's values are made from, F_j = A'_j H, (N, c, c).
        width: d of the merged heads.
        sharing: so many groups that follow one another share their values.

    Returns:
        V (N / sharing, c, width) and O (N, width, C), float64.
    """
    found_values: list[Tensor] = []
    found_outputs: list[Tensor] = []
    for start in range(0, len(groups), sharing):
        own = groups[start : start + sharing]
        left = torch.cat([values[head] for group in own for head in group], 1).double()
        right = torch.block_diag(*(outputs[list(group)].double().flatten(0, 1) for group in own))
        metric = left.T @ grams[start : start + sharing].double().sum(0) @ left
        sizes, vectors = torch.linalg.eigh((metric + metric.T) / 2)
        core = sizes.clamp_min(0).sqrt()[:, None] * vectors.T @ right
        top = torch.linalg.svd(core, full_matrices=False).Vh[:width].T
        v, o = _balanced(left @ (right @ top), top.T, width)
        found_values.append(v)
        found_outputs += o.chunk(len(own), 1)
    return torch.stack(found_values), torch.stack(found_outputs)


def value_bases(values: Tensor, gram: Tensor) -> Tensor:
    """Where to look for the values of merged heads when all of R^c is too much: an orthonormal basis for each.

    Args:
        values: of N groups, merged to k columns instead of d by `merge_values`, (N, c, k), k ≤ c.
        gram: of all heads' features F_j = A'_j H, Σ_j F_jᵀF_j (c, c), whose principal directions stand in for columns
            that are zero.

    Returns:
        (N, c, k), float64.
    """
    principal = torch.linalg.eigh(gram.double()).eigenvectors.flip(1)
    spans = [torch.cat([each[:, each.norm(dim=0) > 0], principal], 1)[:, : each.shape[1]] for each in values]
    return torch.linalg.qr(torch.stack(spans)).Q


def _balanced(values: Tensor, outputs: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """V O as V (c, width) and O (width, C) with VᵀV = O Oᵀ diagonal: training goes on evenly in both.

    Zeros fill what the rank leaves over.
    """
    left, core = torch.linalg.qr(values)
    right, other = torch.linalg.qr(outputs.T)
    u, sizes, v = torch.linalg.svd(core @ other.T, full_matrices=False)
    missing, half = width - len(sizes), sizes.sqrt()
    pad = torch.nn.functional.pad
    return pad(left @ u * half, (0, missing)), pad(half[:, None] * (v @ right.T), (0, 0, 0, missing))


def refit_heads(
    moments: Moments, values: Tensor, outputs: Tensor, rounds: int = ROUNDS, strength: float = RIDGE
) -> tuple[Tensor, Tensor, list[float]]:
    """Fit value and output weights of N heads with fixed maps to a target, from where they start.

    The objective |Y - Σ_j F_j V_j O_j|² + λ Σ_j |V_j O_j|² is minimised in turn over all O_j together (ridge regression
    on the mixed values F_j V_j) and over the V_j, head by head. Each step is an exact minimum over its part, so that
    the objective never rises. Columns of V that are zero begin as random ones: O finds what they are good for.

    Args:
        moments: of the features [F_1, ..., F_N] side by side, (T, N·c), and the targets (T, C); centred where a
            constant beside them is free.
        values: V, (N, c, d).
        outputs: O, (N, d, C).
        rounds: of both steps.
        strength: λ over the mean of the Gram matrix's diagonal.

    Returns:
        V (N, c, d), O (N, d, C) and the objective at the start, with O fitted, and after every round.

    Raises:
        ValueError: the moments do not fit the heads.
    """
    heads, inputs, width = values.shape
    if moments.gram.shape[0] != heads * inputs:
        raise ValueError(
            f"moments of {moments.gram.shape[0]} features do not fit {heads} heads of {inputs} inputs"
        )
    values, outputs = values.double().clone(), outputs.double()
    gram = moments.gram.clone()
    gram.diagonal().add_(ridge(moments.gram, strength))
    blocks = gram.unflatten(0, (heads, inputs)).unflatten(2, (heads, inputs))  # (N, c, N, c)
    cross = moments.cross.unflatten(0, (heads, inputs))
    idle = values.norm(dim=1, keepdim=True) == 0
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=values.dtype)
    values = torch.where(idle, drawn.to(values) * values.std(), values)
    # Gram matrices of all features with each head's mixed values F_j V_j, (N, c, d)
    mixed = [blocks[:, :, j] @ values[j] for j in range(heads)]
    objective = [_objective(moments, mixed, values, outputs)]

    def fit_outputs() -> Tensor:
        inner = (values.mT @ torch.cat(mixed, 2)).flatten(0, 1)
        fitted = solve(inner, (values.mT @ cross).flatten(0, 1)).unflatten(0, (heads, width))
        objective.append(_objective(moments, mixed, values, fitted))
        return fitted

    outputs = fit_outputs()
    for _ in range(rounds):
        for j in range(heads):
            # The normal equation G_jj V_j O_j O_jᵀ = (Z_jᵀY - Σ_{i≠j} G_ji V_i O_i) O_jᵀ
            others = sum((mixed[i][j] @ (outputs[i] @ outputs[j].T) for i in range(heads) if i != j), start=0)
            left = solve(blocks[j, :, j], cross[j] @ outputs[j].T - others)
            values[j] = solve(outputs[j] @ outputs[j].T, left.T).T
            mixed[j] = blocks[:, :, j] @ values[j]
        outputs = fit_outputs()
    balanced = [_balanced(v, o, width) for v, o in zip(values, outputs, strict=True)]
    return torch.stack([v for v, _ in balanced]), torch.stack([o for _, o in balanced]), objective


def _objective(moments: Moments, mixed: Sequence[Tensor], values: Tensor, outputs: Tensor) -> float:
    """|Y|² - 2 <P, ZᵀY> + <P, G P> with P_j = V_j O_j, without P: G P is there by halves."""
    inner = (values.mT @ torch.cat(list(mixed), 2)).flatten(0, 1)
    cross = values.mT @ moments.cross.view(len(values), -1, outputs.shape[2])
    fitted = (inner @ outputs.flatten(0, 1)).view_as(outputs)
    return float((moments.energy + (outputs * (fitted - 2 * cross)).sum()).clamp_min(0))
