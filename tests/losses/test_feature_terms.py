"""Terms on block outputs against loops over samples, tokens and channels in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from one_term import on_features
from torch import Tensor, nn

from shd_diffusion.losses import Term
from shd_diffusion.losses.acam import dice
from shd_diffusion.losses.affinity import affinity_gap
from shd_diffusion.losses.term import StepOutputs

COUNTED = torch.tensor([[True] * 16, [True] * 11 + [False] * 5, [True] * 4 + [False] * 12])


def features(samples: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    taught, learning = torch.randn(samples, 16, 6), torch.randn(samples, 16, 4)
    return taught.double(), learning.double()


def built(name: str, **options: Any) -> tuple[Term, StepOutputs, np.ndarray, np.ndarray]:
    """The term, a step's outputs, and both models' features, the student's behind the projector."""
    taught, learning = features()
    term, outputs = on_features(name, taught, learning, **options)
    projected = term.projectors[0](learning).detach()
    return term, outputs, taught.numpy(), projected.numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum())


def parameters(term: Term) -> int:
    return sum(p.numel() for p in term.parameters())


# --- affinity ----------------------------------------------------------------------------------------------------


def literal_affinity(student: np.ndarray, teacher: np.ndarray) -> float:
    gaps = []
    for i in range(len(student)):
        for j in range(len(student)):
            cosines = [unit(each[i]) @ unit(each[j]) for each in (student, teacher)]
            gaps.append((cosines[0] - cosines[1]) ** 2)
    return float(np.mean(gaps))


def test_affinity() -> None:
    term, outputs, teacher, student = built("affinity")
    expected = np.mean([literal_affinity(*pair) for pair in zip(student, teacher, strict=True)])
    assert term(outputs).item() == pytest.approx(expected, rel=1e-10)
    assert parameters(term) == 0


def test_affinity_of_tokens_that_count() -> None:
    taught, learning = features()
    found = affinity_gap(learning, taught, COUNTED)
    for sample, length in enumerate((16, 11, 4)):
        expected = literal_affinity(learning[sample, :length].numpy(), taught[sample, :length].numpy())
        assert found[sample].item() == pytest.approx(expected, rel=1e-10)


def test_random_projections_are_an_unbiased_estimate() -> None:
    taught, learning = features()
    exact = affinity_gap(learning, taught, COUNTED)
    drawn = torch.randn(16, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(affinity_gap(learning, taught, COUNTED, drawn), exact, rtol=0.05, atol=0)
    # orthogonal vectors of length √N are no estimate: they give the norm itself
    basis = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0] * 4
    torch.testing.assert_close(affinity_gap(learning, taught, COUNTED, basis), exact)
    term, outputs = on_features("affinity", taught, learning, projections=3)
    values = [term(replace(outputs, step=step)).item() for step in (0, 1, 0)]
    assert values[0] == values[2] != values[1]


# --- norm and direction ------------------------------------------------------------------------------------------


def test_norm_and_direction() -> None:
    term, outputs, teacher, student = built("norm_direction")
    found = []
    for s, t in zip(student.reshape(-1, 6), teacher.reshape(-1, 6), strict=True):
        found.append(1 - s @ unit(t) / max(np.linalg.norm(s), np.linalg.norm(t)))
    assert term(outputs).item() == pytest.approx(np.mean(found), rel=1e-10)
    assert parameters(term) == 4 * 6 + 6


def test_a_longer_feature_of_the_same_direction_is_as_good() -> None:
    taught, _ = features()
    term, outputs = on_features("norm_direction", taught, taught)
    term.projectors[0] = nn.Identity()

    def value(student: Tensor) -> float:
        return term(replace(outputs, student=replace(outputs.student, outputs={"blocks.0": student}))).item()

    assert value(taught) == pytest.approx(0, abs=1e-12) == value(3 * taught)
    assert value(taught / 2) == pytest.approx(0.5) and value(-taught) == pytest.approx(2)


# --- contrastive -------------------------------------------------------------------------------------------------


def means(features: np.ndarray) -> list[np.ndarray]:
    return [unit(sample.mean(0)) for sample in features]


def log_softmax(values: list[float]) -> np.ndarray:
    return np.array(values) - np.log(np.exp(values).sum())


def test_interactive() -> None:
    term, outputs, teacher, student = built("contrastive", temperature=0.2)
    s, t = means(student), means(teacher)
    found = [-log_softmax([s[i] @ other / 0.2 for other in t])[i] for i in range(3)]
    assert term(outputs).item() == pytest.approx(np.mean(found), rel=1e-10)
    assert parameters(term) == 4 * 6 + 6


def test_relational() -> None:
    term, outputs, teacher, student = built("contrastive", form="relational", temperature=0.2)
    found = []
    for i in range(3):
        q, p = (
            log_softmax([of[i] @ of[j] / 0.2 for j in range(3) if j != i])
            for of in (means(student), means(teacher))
        )
        found.append((np.exp(p) * (p - q)).sum())
    assert term(outputs).item() == pytest.approx(np.mean(found), rel=1e-10)
    assert parameters(term) == 0


def test_wasserstein() -> None:
    term, outputs, teacher, student = built("contrastive", form="wasserstein", temperature=0.2)
    cost = np.array([[1 - s @ t for t in means(teacher)] for s in means(student)])
    kernel, v = np.exp(-cost / 0.2), np.ones(3)
    for _ in range(1000):
        u = (1 / 3) / (kernel @ v)
        v = (1 / 3) / (kernel.T @ u)
    expected = (u[:, None] * kernel * v * cost).sum()
    assert term(outputs).item() == pytest.approx(expected, rel=1e-8)


# --- adaptive masks ----------------------------------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def literal_dice(masks: np.ndarray) -> float:
    found = []
    for i in range(len(masks)):
        for j in range(len(masks)):
            if i != j:
                a, b = masks[i], masks[j]
                found.append(2 * (a @ b) / (a @ a + b @ b))
    return float(np.mean(found))


def test_adaptive_masks() -> None:
    term, outputs, teacher, student = built("acam", masks=3, overlap=0.5, width=2)
    (masks,) = term.masks
    query, key, value = (each.weight.detach().numpy() for each in (masks.query, masks.key, masks.value))
    of_tokens, of_channels = (each.detach().numpy() for each in (masks.of_tokens, masks.of_channels))
    by_token, by_channel, overlaps = [], [], []
    for s, t in zip(student, teacher, strict=True):
        logits = (t @ query.T) @ (s @ key.T).T / np.sqrt(2)
        weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        fused = weights @ (s @ value.T)
        error = (s - t) ** 2
        chosen = np.array([sigmoid(fused @ m) for m in of_tokens])
        channels = np.array([sigmoid(w * fused.mean(0)) for w in of_channels])
        by_token += [(m * error.mean(1)).sum() / m.sum() for m in chosen]
        by_channel += [(m * error.mean(0)).sum() / m.sum() for m in channels]
        overlaps.append(literal_dice(chosen) + literal_dice(channels))
    expected = (np.mean(by_token) + np.mean(by_channel)) / 2 + 0.5 * np.mean(overlaps)
    assert term(outputs).item() == pytest.approx(expected, rel=1e-10)
    assert parameters(term) == (4 * 6 + 6) + 6 * (2 * 2 + 6) + 2 * 3 * 6


def test_equal_masks_overlap_wholly() -> None:
    mask = torch.rand(2, 1, 7).expand(2, 4, 7).log()
    assert dice(mask).item() == pytest.approx(1) and dice(torch.eye(4)[None].log()).item() == 0


def test_masks_that_have_become_tiny_are_compared_by_their_shape() -> None:
    """Training makes them small, below what float32 holds."""
    masks = torch.rand(2, 4, 7, dtype=torch.float64)
    expected = np.mean([literal_dice(sample.numpy()) for sample in masks])
    tiny = masks.float().log() - 500  # beside 500 float32 tells logarithms apart by 3e-5
    assert dice(tiny).item() == pytest.approx(expected, rel=1e-4)

    term, outputs, *_ = built("acam", masks=3, width=2)
    (learned,) = term.masks
    learned.value.weight.data *= 1e6
    loss = term(outputs)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in term.parameters()) and loss.isfinite()


# --- features through cross-attention ------------------------------------------------------------------------------


def test_features_through_a_cross_attention_projector() -> None:
    term, outputs, teacher, _ = built("features", projector="attention")
    own = term.projectors[0]
    attention, learning = own.attention, features()[1].numpy()
    weights = [
        each.detach().numpy()
        for each in (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    ]
    biases = np.split(attention.in_proj_bias.detach().numpy(), 3)
    out, bias = (each.detach().numpy() for each in (attention.out_proj.weight, attention.out_proj.bias))
    errors = []
    for sample in range(3):
        keyed = learning[sample] + own.positions.detach().numpy()
        for token, asked in enumerate(own.queries.detach().numpy()):
            query = weights[0] @ asked + biases[0]
            logits = np.array([query @ (weights[1] @ key + biases[1]) for key in keyed]) / np.sqrt(6)
            shares = np.exp(logits) / np.exp(logits).sum()
            mixed = sum(
                share * (weights[2] @ key + biases[2]) for share, key in zip(shares, keyed, strict=True)
            )
            errors.append((out @ mixed + bias - teacher[sample, token]) ** 2)
    assert term(outputs).item() == pytest.approx(np.mean(errors), rel=1e-10)
    assert parameters(term) == 16 * (6 + 4) + 2 * (6 + 4) * 6 + 4 * 6
    with pytest.raises(ValueError, match="for 16 tokens cannot take 9; set `projector: linear`"):
        own(torch.zeros(1, 9, 4).double())
