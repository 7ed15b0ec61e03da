"""The baselines against literal float64 oracles; where their gradients go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from shd_diffusion.losses.baselines import BASELINES, Baseline, Captured, build_baselines
from shd_diffusion.losses.baselines.captured import enclosing_block
from shd_diffusion.losses.baselines.vkd import standardise, whiten
from shd_diffusion.training.methods import Captures
from torch import nn

from shd_diffusion.config import LossesConfig
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel

NAMES = list(BASELINES)


def model(heads: int, layers: int, seed: int, **arguments: int) -> DiTTransformer2DModel:
    """In float64, every parameter random: at its initialisation a DiT block is the identity."""
    torch.manual_seed(seed)
    built = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=4, num_layers=layers, in_channels=1, out_channels=1,
        sample_size=8, patch_size=arguments.get("patch_size", 2), num_embeds_ada_norm=3,
    ).double()  # fmt: skip
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built.eval()


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    return model(5, 4, seed=0), model(3, 2, seed=1)


def build(name: str, teacher: nn.Module, student: nn.Module, **options: object) -> Baseline:
    losses = LossesConfig.model_validate({name: {"weight": 1.0, **options}})
    return build_baselines(losses, teacher, student, seed=0)[name].double()


def run(baseline: Baseline, teacher: nn.Module, student: nn.Module) -> tuple[Captured, Captured]:
    """What is captured of the same five images."""
    torch.manual_seed(2)
    images = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    with Captures(teacher, student, False, {"it": baseline}) as captures:
        for each in (teacher, student):
            each(images, timestep=torch.arange(5), class_labels=torch.tensor([0, 1, 2, 3, 0]))
        return captures.read()


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


BLOCKS = [("transformer_blocks.0", "transformer_blocks.1"), ("transformer_blocks.1", "transformer_blocks.3")]
ATTENTIONS = [(f"{ours}.attn1", f"{theirs}.attn1") for ours, theirs in BLOCKS]


def test_features(pair: tuple[nn.Module, nn.Module]) -> None:
    baseline = build("features", *pair)
    assert list(baseline.pairs.items()) == BLOCKS
    taught, learning = run(baseline, *pair)
    errors = []
    for (ours, theirs), projector in zip(BLOCKS, baseline.projectors, strict=True):
        student, teacher = array(learning.outputs[ours]), array(taught.outputs[theirs])
        assert student.shape == (5, 16, 12) and teacher.shape == (5, 16, 20)
        for b in range(5):
            for n in range(16):
                projected = array(projector.weight) @ student[b, n] + array(projector.bias)
                errors.append((projected - teacher[b, n]) ** 2)
    assert baseline(taught, learning).item() == pytest.approx(np.mean(errors), rel=1e-12)
    assert sum(p.numel() for p in baseline.parameters()) == 2 * (12 * 20 + 20)


def test_attention_output_is_what_the_records_say(pair: tuple[nn.Module, nn.Module]) -> None:
    """O = sum over heads of A V W, and the bias, recomputed head by head from attention records."""
    baseline, records = build("attention_output", *pair), build("attention_mse", *pair)
    outputs, seen = run(baseline, *pair), run(records, *pair)
    errors = []
    for (ours, theirs), projector in zip(ATTENTIONS, baseline.projectors, strict=True):
        found = []
        for part, name, of in zip(seen, (theirs, ours), pair, strict=True):
            r = part.records[name]
            q, k, v, weight = map(array, (r.query, r.key, r.value, r.output_weight))
            bias, d = array(of.get_submodule(f"{name}.to_out.0").bias), q.shape[-1]
            total = np.zeros((5, 16, weight.shape[0])) + bias
            for h in range(q.shape[1]):
                maps = softmax(q[:, h] @ k[:, h].transpose(0, 2, 1) / np.sqrt(d))
                total += maps @ v[:, h] @ weight[:, h * d : (h + 1) * d].T
            found.append(total)
        teacher, student = found
        errors.append((student @ array(projector.weight).T + array(projector.bias) - teacher) ** 2)
    assert baseline(*outputs).item() == pytest.approx(np.mean(errors), rel=1e-10)


@pytest.mark.parametrize("normalisation", ["whiten", "standardise"])
def test_vkd(normalisation: str, pair: tuple[nn.Module, nn.Module]) -> None:
    baseline = build("vkd", *pair, normalisation=normalisation)
    taught, learning = run(baseline, *pair)
    distances = []
    for (ours, theirs), projector in zip(BLOCKS, baseline.projectors, strict=True):
        teacher = array(taught.outputs[theirs])
        if normalisation == "whiten":
            flat = teacher.reshape(-1, 20)
            flat = flat - flat.mean(0)
            u, s, vt = np.linalg.svd(flat, full_matrices=False)
            variance = s**2 / len(flat)
            shrunk = s / np.sqrt(variance + 1e-5 * variance.max())
            target = (u * shrunk @ vt).reshape(teacher.shape)
        else:
            centred = teacher - teacher.mean(-1, keepdims=True)
            target = centred / np.sqrt(teacher.var(-1, keepdims=True) + 1e-5)
        gap = np.abs(array(learning.outputs[ours]) @ array(projector.weight).T - target)
        distances.append(np.where(gap < 1, gap**2 / 2, gap - 0.5))
    assert baseline(taught, learning).item() == pytest.approx(np.mean(distances), rel=1e-8)
    assert sum(p.numel() for p in baseline.parameters()) == 2 * 12 * 20


def test_the_projector_of_vkd_stays_orthogonal_while_it_learns(pair: tuple[nn.Module, nn.Module]) -> None:
    baseline = build("vkd", *pair)
    optimizer = torch.optim.AdamW(baseline.parameters(), lr=0.1)
    captured = run(baseline, *pair)
    before = [projector.weight.detach().clone() for projector in baseline.projectors]
    losses = []
    for _ in range(5):
        loss = baseline(*captured)
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for projector, old in zip(baseline.projectors, before, strict=True):
        weight = projector.weight
        assert (weight - old).abs().max() > 0.01
        torch.testing.assert_close(weight.T @ weight, torch.eye(12).double(), atol=1e-10, rtol=0)


def test_whitened_features_have_the_identity_as_covariance() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(6, 6, dtype=torch.float64)
    white = whiten(torch.randn(50, 8, 6, dtype=torch.float64) @ mixing + 3).reshape(-1, 6)
    np.testing.assert_allclose(np.cov(array(white).T, bias=True), np.eye(6), atol=2e-2)
    assert white.mean(0).abs().max() < 1e-10
    flat = standardise(torch.randn(4, 3, 6))
    torch.testing.assert_close(flat.mean(-1), torch.zeros(4, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", ["equal", "average"])
def test_attention_mse(heads: str) -> None:
    teacher, student = model(3 if heads == "equal" else 5, 4, seed=0), model(3, 2, seed=1)
    baseline = build("attention_mse", teacher, student, heads=heads)
    taught, learning = run(baseline, teacher, student)
    errors = []
    for ours, theirs in ATTENTIONS:
        logits = []
        for record in (taught.records[theirs], learning.records[ours]):
            q, k = array(record.query), array(record.key)
            scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1])
            logits.append(scores.mean(1) if heads == "average" else scores)
        errors.append(((logits[1] - logits[0]) ** 2).mean())
    assert baseline(taught, learning).item() == pytest.approx(np.mean(errors), rel=1e-12)
    assert list(baseline.parameters()) == []


def test_aligner(pair: tuple[nn.Module, nn.Module]) -> None:
    baseline = build("aligner", *pair)
    taught, learning = run(baseline, *pair)
    theirs, ours = (
        np.concatenate(
            [
                softmax(np.einsum("bhqd,bhkd->bhqk", array(r.query), array(r.key)) / np.sqrt(4))
                for r in part.records.values()
            ],
            axis=1,
        )
        for part in (taught, learning)
    )
    weights = softmax(array(baseline.scores["self"]))
    assert weights.shape == (20, 6)
    mixed = np.einsum("mn,bnqk->bmqk", weights, ours)
    expected = (theirs * np.log(theirs / mixed)).sum(-1).mean()
    assert baseline(taught, learning).item() == pytest.approx(expected, rel=1e-10)


def test_the_aligner_mixes_by_distributions(pair: tuple[nn.Module, nn.Module]) -> None:
    """Row-stochastic weights: what is aligned is a distribution over the keys again."""
    baseline = build("aligner", *pair)
    with torch.no_grad():
        baseline.scores["self"].mul_(30)
    weights = baseline.weights("self")
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_student_and_projector_and_never_the_teacher(
    name: str, pair: tuple[nn.Module, nn.Module]
) -> None:
    teacher, student = pair  # the teacher is not even frozen
    baseline = build(name, teacher, student)
    baseline(*run(baseline, teacher, student)).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    queries = student.get_submodule("transformer_blocks.0.attn1.to_q").weight
    assert queries.grad is not None and queries.grad.abs().max() > 0
    for key, parameter in baseline.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name: str, pair: tuple[nn.Module, nn.Module]) -> None:
    teacher, student = pair
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            student.enable_gradient_checkpointing()
        student.train().zero_grad()
        student.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob = 0.0
        student.transformer_blocks[1].norm1.emb.class_embedder.dropout_prob = 0.0
        baseline = build(name, teacher, student)
        baseline(*run(baseline, teacher, student)).backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_parameters_follow_from_the_seed_and_leave_the_generator_alone(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    torch.manual_seed(7)
    first = build("features", *pair)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    second = build("features", *pair)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_weight_0_builds_nothing(pair: tuple[nn.Module, nn.Module]) -> None:
    assert build_baselines(LossesConfig(), *pair, seed=0) == {}


def test_what_cannot_be_compared_is_said(pair: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"losses\.attention_mse: .* 3 heads.* 5; set heads: average"):
        build("attention_mse", *pair, heads="equal")
    with pytest.raises(ValueError, match=r"losses\.features: .*2 student blocks"):
        build("features", *pair, layer_map=[0])
    coarse = model(3, 2, seed=1, patch_size=4)
    baseline = build("features", pair[0], coarse)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0 has 4 tokens, the teacher's .* 16"):
        baseline(*run(baseline, pair[0], coarse))


def test_blocks_that_do_not_run_are_left_out() -> None:
    """MDTv2's side block runs in masked passes only, so no projector waits for it."""
    models = []
    for heads, layers in ((3, 6), (2, 4)):
        built = MDTv2Transformer2DModel(
            num_attention_heads=heads, attention_head_dim=4, in_channels=1, num_layers=layers,
            num_decoder_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=3,
        ).double()  # fmt: skip
        for parameter in built.parameters():
            nn.init.normal_(parameter, std=0.2)
        models.append(built.eval())
    for name in NAMES:
        baseline = build(name, *models)
        assert not any("side" in module for pair in baseline.pairs.items() for module in pair)
        assert len(baseline.pairs) == (0 if name == "aligner" else 4)
        assert baseline(*run(baseline, *models)).item() > 0


def test_the_block_around_an_attention_module() -> None:
    assert enclosing_block("transformer_blocks.3.attn1") == "transformer_blocks.3"
    assert enclosing_block("mid_block.attentions.0") == "mid_block.attentions.0"
    assert (
        enclosing_block("down_blocks.0.attentions.1.transformer_blocks.0.attn2")
        == "down_blocks.0.attentions.1.transformer_blocks.0"
    )
