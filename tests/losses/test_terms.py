"""The terms of the loss against literal float64 oracles; where their gradients go, and what is captured for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from one_term import on_features
from small_models import small_dit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.attention.blocks import enclosing_block
from shd_diffusion.attention.outputs import OutputCapture
from shd_diffusion.losses import TERMS, LossesConfig, Term, build_terms
from shd_diffusion.losses.term import Batch, Captured, StepOutputs
from shd_diffusion.losses.variance import variational_bound
from shd_diffusion.losses.vkd import standardise, whiten
from shd_diffusion.models.denoiser import freeze, null_condition, predict
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel
from shd_diffusion.models.trace import Trace, trace
from shd_diffusion.training.objectives import TrainingLoss

INSIDE = [name for name, term in TERMS.items() if term.captures is not None]
WITH_PROJECTORS = ["features", "vkd", "attention_output"]
PROCESS = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))
Pair = tuple[ModelMixin, ModelMixin]  # teacher and student


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
def pair() -> Pair:
    return model(5, 4, seed=0), model(3, 2, seed=1)


TRACES: dict[tuple[type, str], Trace] = {}


def traced(model: ModelMixin) -> Trace:
    """Follows from class and config alone: a trace runs a twin without weights."""
    key = type(model), model.to_json_string()
    if key not in TRACES:
        TRACES[key] = trace(model, (1, 8, 8), null_condition(model))
    return TRACES[key]


def only(**given: Mapping[str, object]) -> LossesConfig:
    """These terms, with weight 1 where they name none; unchecked, since there may be steps without any."""
    return LossesConfig.model_construct(
        **{
            name: term.Config.model_validate({"weight": float(name in given), **given.get(name, {})})
            for name, term in TERMS.items()
        }
    )


def build(name: str, teacher: ModelMixin, student: ModelMixin, **options: object) -> Term:
    return build_terms(only(**{name: options}), traced(student), traced(teacher), seed=0)[name].double()


def batch(samples: int = 5) -> Batch:
    torch.manual_seed(2)
    clean, noise = torch.randn(2, samples, 1, 8, 8, dtype=torch.float64)
    timesteps = torch.tensor([0, 3, 250, 700, 999])[:samples]
    labels = {"class_labels": torch.tensor([0, 1, 2, 3, 0])[:samples]}
    return Batch(clean, noise, PROCESS.noised(clean, noise, timesteps), timesteps, labels)


def captured(model: ModelMixin, term: Term, side: int) -> tuple[torch.Tensor, Captured]:
    """The prediction of the batch, and what the term looks at."""
    of, names = batch(), term.looks_at[side]
    inputs = of.noised, of.timesteps, of.condition
    if term.captures == "records":
        with AttentionCapture(model, names) as records:
            return predict(model, *inputs), Captured(records=records.records)
    with OutputCapture(model, names if term.captures else []) as outputs:
        return predict(model, *inputs), Captured(outputs=outputs.outputs)


def run(term: Term, teacher: ModelMixin, student: ModelMixin) -> StepOutputs:
    """A step's outputs; the teacher is not even frozen."""
    prediction, of_student = captured(student, term, 0)
    target, of_teacher = captured(teacher, term, 1)
    return StepOutputs(PROCESS, batch(), prediction, target, of_student, of_teacher)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


BLOCKS = [("transformer_blocks.0", "transformer_blocks.1"), ("transformer_blocks.1", "transformer_blocks.3")]
ATTENTIONS = [(f"{own}.attn1", f"{by}.attn1") for own, by in BLOCKS]


def test_features(pair: Pair) -> None:
    term = build("features", *pair)
    assert list(term.pairs.items()) == BLOCKS
    outputs = run(term, *pair)
    taught, learning = outputs.teacher, outputs.student
    errors = []
    for (own, by), projector in zip(BLOCKS, term.projectors, strict=True):
        student, teacher = array(learning.outputs[own]), array(taught.outputs[by])
        assert student.shape == (5, 16, 12) and teacher.shape == (5, 16, 20)
        for b in range(5):
            for n in range(16):
                projected = array(projector.weight) @ student[b, n] + array(projector.bias)
                errors.append((projected - teacher[b, n]) ** 2)
    assert term(outputs).item() == pytest.approx(np.mean(errors), rel=1e-12)
    assert sum(p.numel() for p in term.parameters()) == 2 * (12 * 20 + 20)


def test_attention_output_is_what_the_records_say(pair: Pair) -> None:
    """O = sum over heads of A V W, and the bias, recomputed head by head from attention records."""
    term, records = build("attention_output", *pair), build("attention_mse", *pair)
    outputs, seen = run(term, *pair), run(records, *pair)
    errors = []
    for (own, by), projector in zip(ATTENTIONS, term.projectors, strict=True):
        found = []
        for part, name, of in zip((seen.teacher, seen.student), (by, own), pair, strict=True):
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
    assert term(outputs).item() == pytest.approx(np.mean(errors), rel=1e-10)


@pytest.mark.parametrize(("teacher", "student"), [(32, 8), (8, 32)])
def test_features_on_grids_of_different_size_are_compared_on_the_coarser(teacher: int, student: int) -> None:
    """4 × 8 tokens and 2 × 4, of samples twice as wide as high."""
    torch.manual_seed(0)
    taught, learning = torch.randn(2, teacher, 5).double(), torch.randn(2, student, 3).double()
    term, outputs = on_features("features", taught, learning, shape=(4, 8))

    def coarse(features: np.ndarray) -> np.ndarray:
        if features.shape[1] == 8:
            return features
        found = np.zeros((2, 8, features.shape[2]))
        for token in range(32):
            found[:, token // 8 // 2 * 4 + token % 8 // 2] += features[:, token] / 4
        return found

    (projector,) = term.projectors
    projected = coarse(array(learning)) @ array(projector.weight).T + array(projector.bias)
    expected = ((projected - coarse(array(taught))) ** 2).mean()
    assert term(outputs).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("normalisation", ["whiten", "standardise"])
def test_vkd(normalisation: str, pair: Pair) -> None:
    term = build("vkd", *pair, normalisation=normalisation)
    outputs = run(term, *pair)
    taught, learning = outputs.teacher, outputs.student
    distances = []
    for (own, by), projector in zip(BLOCKS, term.projectors, strict=True):
        teacher = array(taught.outputs[by])
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
        gap = np.abs(array(learning.outputs[own]) @ array(projector.weight).T - target)
        distances.append(np.where(gap < 1, gap**2 / 2, gap - 0.5))
    assert term(outputs).item() == pytest.approx(np.mean(distances), rel=1e-8)
    assert sum(p.numel() for p in term.parameters()) == 2 * 12 * 20


def test_the_projector_of_vkd_stays_orthogonal_while_it_learns(pair: Pair) -> None:
    term = build("vkd", *pair)
    optimizer = torch.optim.AdamW(term.parameters(), lr=0.1)
    step = run(term, *pair)
    before = [projector.weight.detach().clone() for projector in term.projectors]
    losses = []
    for _ in range(5):
        loss = term(step)
        optimizer.zero_grad()
        loss.backward(retain_graph=True)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for projector, old in zip(term.projectors, before, strict=True):
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
    term = build("attention_mse", teacher, student, heads=heads)
    outputs = run(term, teacher, student)
    taught, learning = outputs.teacher, outputs.student
    errors = []
    for own, by in ATTENTIONS:
        logits = []
        for record in (taught.records[by], learning.records[own]):
            q, k = array(record.query), array(record.key)
            scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1])
            logits.append(scores.mean(1) if heads == "average" else scores)
        errors.append(((logits[1] - logits[0]) ** 2).mean())
    assert term(outputs).item() == pytest.approx(np.mean(errors), rel=1e-12)
    assert list(term.parameters()) == []


def test_aligner(pair: Pair) -> None:
    term = build("aligner", *pair)
    outputs = run(term, *pair)
    taught, learning = outputs.teacher, outputs.student
    of_teacher, of_student = (
        np.concatenate(
            [
                softmax(np.einsum("bhqd,bhkd->bhqk", array(r.query), array(r.key)) / np.sqrt(4))
                for r in part.records.values()
            ],
            axis=1,
        )
        for part in (taught, learning)
    )
    weights = softmax(array(term.scores["self"]))
    assert weights.shape == (20, 6)
    mixed = np.einsum("mn,bnqk->bmqk", weights, of_student)
    expected = (of_teacher * np.log(of_teacher / mixed)).sum(-1).mean()
    assert term(outputs).item() == pytest.approx(expected, rel=1e-10)


def test_the_aligner_mixes_by_distributions(pair: Pair) -> None:
    """Row-stochastic weights: what is aligned is a distribution over the keys again."""
    term = build("aligner", *pair)
    with torch.no_grad():
        term.scores["self"].mul_(30)
    weights = term.weights("self")
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(20, dtype=torch.float64))


@pytest.mark.parametrize("name", INSIDE)
def test_gradients_reach_student_and_projector_and_never_the_teacher(name: str, pair: Pair) -> None:
    teacher, student = pair  # the teacher is not even frozen
    term = build(name, teacher, student)
    term(run(term, teacher, student)).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    queries = student.get_submodule("transformer_blocks.0.attn1.to_q").weight
    assert queries.grad is not None and queries.grad.abs().max() > 0
    for key, parameter in term.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", INSIDE)
def test_gradient_checkpointing_changes_nothing(name: str, pair: Pair) -> None:
    teacher, student = pair
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            student.enable_gradient_checkpointing()
        student.train().zero_grad()
        student.transformer_blocks[0].norm1.emb.class_embedder.dropout_prob = 0.0
        student.transformer_blocks[1].norm1.emb.class_embedder.dropout_prob = 0.0
        term = build(name, teacher, student)
        term(run(term, teacher, student)).backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", [*WITH_PROJECTORS, "aligner"])
def test_parameters_follow_from_the_seed_and_leave_the_generator_alone(name: str, pair: Pair) -> None:
    teacher, student = map(traced, pair)
    torch.manual_seed(7)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    losses = only(**{name: {}})
    first, second, other = (
        list(build_terms(losses, student, teacher, seed)[name].parameters()) for seed in (0, 0, 1)
    )
    assert torch.equal(drawn, torch.rand(1))
    assert first and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_weight_0_builds_nothing(pair: Pair) -> None:
    teacher, student = map(traced, pair)
    assert build_terms(only(), student, teacher, seed=0) == {}
    assert list(build_terms(LossesConfig(), student, teacher, seed=0)) == ["denoise", "output", "shd"]


@pytest.mark.parametrize("name", TERMS)
def test_what_a_term_looks_at(name: str) -> None:
    teacher, student = model(4, 4, seed=0), model(2, 2, seed=1)
    term = TERMS[name](TERMS[name].Config(), traced(student), traced(teacher))
    looked = [list(names) for names in term.looks_at]
    blocks = [f"transformer_blocks.{i}" for i in range(4)]
    attentions = [f"{block}.attn1" for block in blocks]
    expected: dict[str, list[list[str]]] = {
        "features": [blocks[:2], blocks[1::2]],
        "vkd": [blocks[:2], blocks[1::2]],
        "attention_output": [attentions[:2], attentions[1::2]],
        "shd": [attentions[:2], attentions[1::2]],
        "attention_mse": [attentions[:2], attentions[1::2]],
        "aligner": [attentions[:2], attentions],
    }
    assert (TERMS[name].captures is None and looked == [[], []]) or looked == expected.get(name, looked)


def test_what_cannot_be_compared_is_said(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"losses\.attention_mse: .* 3 heads.* 5; set heads: average"):
        build("attention_mse", *pair, heads="equal")
    with pytest.raises(ValueError, match=r"losses\.features: .*2 student blocks"):
        build("features", *pair, layer_map=[0])
    coarse = model(3, 2, seed=1, patch_size=4)
    with pytest.raises(ValueError, match=r"blocks\.0 has 9 tokens, the teacher's blocks\.0 16"):
        on_features("features", torch.zeros(2, 16, 3), torch.zeros(2, 9, 3))
    with pytest.raises(ValueError, match=r"losses\.aligner: .* token grids differ"):
        build("aligner", pair[0], coarse)


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
    for name in INSIDE:
        term = build(name, *models)
        assert not any("side" in module for names in term.looks_at for module in names)
        assert [len(names) for names in term.looks_at] == ([4, 6] if name == "aligner" else [4, 4])
        assert term(run(term, *models)).item() > 0


def test_the_block_around_an_attention_module() -> None:
    assert enclosing_block("transformer_blocks.3.attn1") == "transformer_blocks.3"
    assert enclosing_block("mid_block.attentions.0") == "mid_block.attentions.0"
    assert (
        enclosing_block("down_blocks.0.attentions.1.transformer_blocks.0.attn2")
        == "down_blocks.0.attentions.1.transformer_blocks.0"
    )


# --- terms on the prediction -------------------------------------------------------------------------------------


def outputs_of(prediction: torch.Tensor, target: torch.Tensor | None = None) -> StepOutputs:
    return StepOutputs(PROCESS, batch(), prediction, target)


def test_denoising_and_output_kd_are_of_the_denoised_channels() -> None:
    """A predicted variance, of either model, takes no part in them."""
    torch.manual_seed(3)
    found, target = torch.randn(2, 5, 2, 8, 8, dtype=torch.float64)
    found.requires_grad_()
    variance = Trace((1, 8, 8), {}, torch.empty(1, 2, 8, 8))
    terms = build_terms(only(denoise={}, output={}, variance={}), variance, variance, 0)
    assert list(terms) == ["denoise", "variance", "output"]
    of = batch()
    outputs = outputs_of(found, target)
    noise = array(found)[:, :1]
    assert terms["denoise"](outputs).item() == pytest.approx(
        np.mean((noise - array(of.noise)) ** 2), rel=1e-12
    )
    assert terms["output"](outputs).item() == pytest.approx(
        np.mean((noise - array(target)[:, :1]) ** 2), rel=1e-12
    )
    assert terms["output"](outputs_of(found[:, :1], target)) == terms["output"](outputs)
    bound = variational_bound(PROCESS, found, of.clean, of.noised, of.timesteps)
    assert terms["variance"](outputs) == bound
    other = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))
    with FakeTensorMode(allow_non_fake_inputs=True):  # as a dry run counts; nothing of it is kept
        variational_bound(other, found, of.clean, of.noised, of.timesteps)
    assert variational_bound(other, found, of.clean, of.noised, of.timesteps) == bound
    (gradient,) = torch.autograd.grad(terms["output"](outputs), found)
    assert gradient[:, :1].any() and not gradient[:, 1:].any()


def test_denoising_weighed_by_min_snr() -> None:
    found = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    plain = Trace((1, 8, 8), {}, torch.empty(1, 1, 8, 8))
    term = build_terms(only(denoise={"min_snr_gamma": 5.0}), plain, None, 0)["denoise"]
    of = batch()
    a, s = (array(scale).ravel() for scale in PROCESS.scales(of.timesteps, of.clean))
    weights = np.minimum(a**2 / s**2, 5) / (a**2 / s**2)
    errors = ((array(found) - array(of.noise)) ** 2).mean((1, 2, 3))
    assert term(outputs_of(found)).item() == pytest.approx(
        (weights * errors).mean(), rel=1e-6
    )  # float32 weights


@pytest.mark.parametrize("options", [{"min_snr_gamma": 5.0}, {"truncated_snr": True}], ids=str)
def test_output_kd_weighed_by_timestep(options: dict[str, object]) -> None:
    found, target = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64)
    plain = Trace((1, 8, 8), {}, torch.empty(1, 1, 8, 8))
    term = build_terms(only(output=options), plain, plain, 0)["output"]
    a, s = (array(scale).ravel() for scale in PROCESS.scales(batch().timesteps, batch().clean))
    snr = a**2 / s**2
    weights = np.minimum(snr, 5) / snr if "min_snr_gamma" in options else np.maximum(snr, 1) / snr
    errors = array(found - target) ** 2
    expected = (weights * errors.mean((1, 2, 3))).mean()
    assert term(outputs_of(found, target)).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="two weights"):
        TERMS["output"].Config(min_snr_gamma=5.0, truncated_snr=True)


def test_output_kd_of_a_guided_teacher(pair: Pair) -> None:
    """Against two passes of the teacher sample by sample; what is captured is of the pass with the condition."""
    teacher, student = freeze(pair[0]), pair[1]
    terms = build_terms(
        only(output={"guidance_scale": 3.0}, attention_mse={}), traced(student), traced(teacher), 0
    )
    of = replace(batch(), null=null_condition(teacher))
    seen: list[StepOutputs] = []
    terms["output"].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with TrainingLoss(PROCESS, terms, student, teacher, 10) as loss, torch.no_grad():
        found = loss(student, of, 0)
    errors = []
    for place in range(5):
        noised, timestep = of.noised[place : place + 1], of.timesteps[place : place + 1]
        own, cond, null = (
            array(predict(model, noised, timestep, {"class_labels": torch.tensor([label])}))
            for model, label in (
                (student, int(of.condition["class_labels"][place])),
                (teacher, int(of.condition["class_labels"][place])),
                (teacher, 3),
            )
        )
        errors.append(((own - (null + 3.0 * (cond - null))) ** 2).mean())
    assert found["output"].item() == pytest.approx(np.mean(errors), rel=1e-10)
    plain = run(terms["attention_mse"], teacher, student)
    for name, record in plain.teacher.records.items():
        torch.testing.assert_close(seen[0].teacher.records[name].query, record.query)


def test_a_term_may_count_in_a_part_of_the_run_alone(pair: Pair) -> None:
    teacher, student = freeze(pair[0]), pair[1]
    losses = only(output={"during": [0.5, 1.0]}, shd={"during": [0.0, 0.5], "weight": 2.0})
    terms = build_terms(losses, traced(student), traced(teacher), 0)
    with TrainingLoss(PROCESS, terms, student, teacher, 4) as loss, torch.no_grad():
        found = [(list(loss(student, batch(), step)), loss.weights(step)["shd"]) for step in range(4)]
    assert found == [(["shd"], 2.0), (["shd"], 2.0), (["output"], 0.0), (["output"], 0.0)]


def test_any_weight_may_decay_and_shd_counts_at_every_so_many_steps(pair: Pair) -> None:
    teacher, student = traced(freeze(pair[0])), traced(pair[1])
    losses = only(output={"decay": "linear"}, shd={"weight": 2.0, "decay": "linear", "every": 2}, denoise={})
    terms = build_terms(losses, student, teacher, 0)
    weights = {name: [term.weight(step, 4) for step in range(4)] for name, term in terms.items()}
    assert weights == {"denoise": [1, 1, 1, 1], "output": [1, 0.75, 0.5, 0.25], "shd": [0, 1.5, 0, 0.5]}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"denoise": {"during": [0.5, 0.5]}}, "begins and ends"),
        (
            {"denoise": {"weight": 0}, "shd": {"weight": 0}, "output": {"during": [0.1, 1]}},
            "without any term",
        ),
        (
            {"denoise": {"during": [0, 0.4]}, "output": {"during": [0.5, 1]}, "shd": {"weight": 0}},
            "without any",
        ),
    ],
)
def test_parts_of_a_run_that_leave_steps_without_a_loss(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LossesConfig.model_validate(given)
    LossesConfig.model_validate({"denoise": {"during": [0, 0.5]}, "output": {"during": [0.5, 1]}})


def test_a_variance_is_a_term_where_one_is_predicted() -> None:
    for channels in (1, 2):
        student = traced(small_dit(2, out_channels=channels))
        terms = build_terms(only(denoise={}, variance={}), student, None, 0)
        assert ("variance" in terms) == (channels == 2)


# --- all terms of a step -----------------------------------------------------------------------------------------


def test_only_mapped_blocks_are_captured() -> None:
    """A teacher of 4 blocks for a student of 2: two records of it, and outputs only where a term wants them."""
    teacher, student = freeze(model(4, 4, seed=0)), model(2, 2, seed=1)
    terms = build_terms(only(shd={}, features={}), traced(student), traced(teacher), 0)
    terms["features"].double()
    seen: list[StepOutputs] = []
    terms["shd"].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    with TrainingLoss(PROCESS, terms, student, teacher, 10) as loss:
        loss(student, batch(), 0)
    (outputs,) = seen
    assert list(outputs.teacher.records) == ["transformer_blocks.1.attn1", "transformer_blocks.3.attn1"]
    assert list(outputs.student.records) == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert sorted(outputs.teacher.outputs) == ["transformer_blocks.1", "transformer_blocks.3"]


@pytest.mark.parametrize("name", INSIDE)
def test_a_term_that_ends_early_leaves_no_parameter_without_a_gradient(name: str) -> None:
    """Distributed training waits for one of every parameter; behind what the term looks at it is 0."""
    teacher, student = freeze(model(4, 4, seed=0)), model(2, 2, seed=1)
    terms = build_terms(only(**{name: {}}), traced(student), traced(teacher), 0)
    terms[name].double()
    of = batch()
    with TrainingLoss(PROCESS, terms, student, teacher, 10) as loss:
        found = loss(student, of, 0)
    assert list(found) == [name]
    found[name].backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    last = student.proj_out_2.weight.grad
    assert last is not None and not last.any()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in terms[name].parameters())


def test_grids_that_cannot_be_compared_are_refused_when_a_term_is_built() -> None:
    teacher = traced(small_dit(4))
    coarse = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=2, in_channels=1, out_channels=1,
        sample_size=9, patch_size=3, num_embeds_ada_norm=10,
    )  # fmt: skip
    student = trace(coarse, (1, 9, 9), null_condition(coarse))
    with pytest.raises(ValueError, match=r"losses\.shd: block .*attn1: maps over 16 and 9 tokens"):
        build_terms(only(shd={}), student, teacher, 0)
    with pytest.raises(ValueError, match=r"losses\.attention_mse: logits of .* the teacher's"):
        build_terms(only(attention_mse={}), student, teacher, 0)
