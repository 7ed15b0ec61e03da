"""Feature terms on blocks that put out two streams, image and text, against literal float64 oracles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, ModelMixin, SD3Transformer2DModel

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.attention.outputs import OutputCapture
from shd_diffusion.losses import TERMS, Term
from shd_diffusion.losses.features import squared_distance
from shd_diffusion.losses.padding import with_text_mask
from shd_diffusion.losses.term import Batch, Captured, StepOutputs
from shd_diffusion.models.denoiser import freeze, predict
from shd_diffusion.models.families import TEXT_MASK
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.trace import Trace, trace
from shd_diffusion.training.objectives import TrainingLoss

PROCESS = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig(objective="flow")))
TEXT = 5


def sd3(heads: int, layers: int) -> ModelMixin:
    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=layers, attention_head_dim=8,
        num_attention_heads=heads, caption_projection_dim=8 * heads, joint_attention_dim=6,
        pooled_projection_dim=4, pos_embed_max_size=8,
    )  # fmt: skip


def flux(heads: int, layers: int) -> ModelMixin:
    return FluxTransformer2DModel(
        in_channels=16, num_layers=layers, num_single_layers=layers, attention_head_dim=8, num_attention_heads=heads,
        joint_attention_dim=6, pooled_projection_dim=4, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def double(build: Callable[[int, int], ModelMixin], heads: int, layers: int) -> ModelMixin:
    """In float64, every parameter random."""
    torch.manual_seed(heads)
    model = build(heads, layers)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


def batch() -> Batch:
    torch.manual_seed(3)
    clean, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    timesteps = torch.tensor([20.0, 300.0, 900.0], dtype=torch.float64)
    condition = {
        "encoder_hidden_states": torch.randn(3, TEXT, 6, dtype=torch.float64),
        "pooled_projections": torch.randn(3, 4, dtype=torch.float64),
    }
    return Batch(clean, noise, PROCESS.noised(clean, noise, timesteps), timesteps, condition)


@cache
def traced(model: ModelMixin) -> Trace:
    return trace(model, (4, 8, 8), {name: value[:1] for name, value in batch().condition.items()})


def built(name: str, teacher: ModelMixin, student: ModelMixin, **options: Any) -> Term:
    torch.manual_seed(0)
    return TERMS[name](TERMS[name].Config(**options), traced(student), traced(teacher)).double()


def outputs_of(term: Term, teacher: ModelMixin, student: ModelMixin) -> StepOutputs:
    of, found = batch(), []
    for model, names in zip((student, teacher), term.looks_at, strict=True):
        with OutputCapture(model, names) as capture:
            prediction = predict(model, of.noised, of.timesteps, of.condition)
            found.append((prediction, Captured(outputs=capture.outputs)))
    return StepOutputs(PROCESS, of, found[0][0], found[1][0], found[0][1], found[1][1])


@cache
def features(model: ModelMixin, module: str) -> dict[str, np.ndarray]:
    """What a module puts out in the batch, by its number of tokens: 16 are the image's, 5 the text's."""
    found: list[Any] = []
    hook = model.get_submodule(module).register_forward_hook(lambda _, __, output: found.append(output))
    of = batch()
    with torch.no_grad():
        predict(model, of.noised, of.timesteps, of.condition)
    hook.remove()
    (output,) = found
    parts = [output] if isinstance(output, torch.Tensor) else [part for part in output if part is not None]
    names = {16: "image", TEXT: "text", 16 + TEXT: "both"}
    return {names[part.shape[1]]: part.numpy() for part in parts}


BLOCK, SINGLE = "transformer_blocks", "single_transformer_blocks"
# (family, term) to the pairs: the student's module, the teacher's, the stream
PAIRS: dict[tuple[str, str], list[tuple[str, str, str]]] = {
    ("sd3", "features"): [
        (f"{BLOCK}.0", f"{BLOCK}.1", "image"),
        (f"{BLOCK}.0", f"{BLOCK}.1", "text"),
        (f"{BLOCK}.1", f"{BLOCK}.3", "image"),  # here the text ends
    ],
    ("sd3", "attention_output"): [
        (f"{BLOCK}.0.attn", f"{BLOCK}.1.attn", "image"),
        (f"{BLOCK}.0.attn", f"{BLOCK}.1.attn", "text"),
        (f"{BLOCK}.1.attn", f"{BLOCK}.3.attn", "image"),
    ],
    ("flux", "features"): [
        *((f"{BLOCK}.{s}", f"{BLOCK}.{2 * s + 1}", stream) for s in (0, 1) for stream in ("image", "text")),
        (f"{SINGLE}.0", f"{SINGLE}.1", "image"),
        (f"{SINGLE}.0", f"{SINGLE}.1", "text"),
        (f"{SINGLE}.1", f"{SINGLE}.3", "image"),
    ],
    ("flux", "attention_output"): [
        *((f"{BLOCK}.{s}.attn", f"{BLOCK}.{2 * s + 1}.attn", stream) for s in (0, 1) for stream in ("image", "text")),
        (f"{SINGLE}.0.attn", f"{SINGLE}.1.attn", "both"),
        (f"{SINGLE}.1.attn", f"{SINGLE}.3.attn", "both"),
    ],
}  # fmt: skip
MODELS = {name: (double(build, 4, 4), double(build, 2, 2)) for name, build in (("sd3", sd3), ("flux", flux))}


@pytest.mark.parametrize(("family", "name"), PAIRS)
@pytest.mark.parametrize(
    "options",
    [{}, {"normalise": True}, {"within_deviations": 2.0}, {"normalise": True, "within_deviations": 1.5}],
)
def test_image_tokens_meet_image_tokens_and_text_meets_text(
    family: str, name: str, options: dict[str, Any]
) -> None:
    teacher, student = MODELS[family]
    term = built(name, teacher, student, **options)
    distances, left_out = [], 0
    for (own, by, stream), projector in zip(PAIRS[family, name], term.projectors, strict=True):
        ours, theirs = features(student, own)[stream], features(teacher, by)[stream]
        weight, bias = projector.weight.detach().numpy(), projector.bias.detach().numpy()
        of_samples = []
        for x, y in zip(ours, theirs, strict=True):
            errors = (x @ weight.T + bias - y) ** 2
            k = options.get("within_deviations", np.inf)
            inside = np.abs(y - y.mean()) <= k * y.std(ddof=1)
            left_out += (~inside).sum()
            scale = (y[inside] ** 2).mean() if options.get("normalise") else 1.0
            of_samples.append(errors[inside].mean() / scale)
        distances.append(np.mean(of_samples))
    assert term(outputs_of(term, teacher, student)).item() == pytest.approx(np.mean(distances), rel=1e-12)
    assert (left_out > 0) == ("within_deviations" in options)


@pytest.mark.parametrize("name", ["features", "attention_output", "vkd"])
@pytest.mark.parametrize("family", MODELS)
def test_what_padded_text_puts_out_changes_nothing(family: str, name: str) -> None:
    teacher, student = MODELS[family]
    of, mask = batch(), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    condition = {**of.condition, TEXT_MASK: mask}
    one = {key: value[:1] for key, value in condition.items()}
    torch.manual_seed(0)
    traces = [trace(model, (4, 8, 8), one) for model in (student, teacher)]
    term = TERMS[name](TERMS[name].Config(), *traces).double()
    found = outputs_of(term, teacher, student)
    with AttentionCapture(student) as capture:
        predict(student, of.noised, of.timesteps, condition)
        records = with_text_mask(capture.records, condition)

    def with_in(rows: torch.Tensor, value: float) -> float:
        """The term where these rows of the text hold a value, whatever else a module puts out."""

        def filled(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            wide = {n: F.pad(rows, (0, output.shape[1] - TEXT)) for n, output in outputs.items()}
            return {
                n: output if output.shape[1] == 16 else output.masked_fill(wide[n][..., None], value)
                for n, output in outputs.items()
            }

        ours, theirs = (filled(each.outputs) for each in (found.student, found.teacher))
        return term(replace(found, student=Captured(records, ours), teacher=Captured({}, theirs))).item()

    assert with_in(~mask, 7.0) == with_in(~mask, -3.0) != with_in(mask, -3.0)


@pytest.mark.parametrize("family", MODELS)
def test_vkd(family: str) -> None:
    teacher, student = MODELS[family]
    term = built("vkd", teacher, student, normalisation="standardise")
    distances = []
    for (own, by, stream), projector in zip(PAIRS[family, "features"], term.projectors, strict=True):
        y = features(teacher, by)[stream]
        target = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        gap = np.abs(features(student, own)[stream] @ projector.weight.detach().numpy().T - target)
        distances.append(np.where(gap < 1, gap**2 / 2, gap - 0.5).mean())
    assert term(outputs_of(term, teacher, student)).item() == pytest.approx(np.mean(distances), rel=1e-10)


def test_a_distance_is_the_mean_over_samples_however_they_are_dealt_out() -> None:
    torch.manual_seed(0)
    projected, target = torch.randn(2, 6, 7, 4, dtype=torch.float64)
    whole = squared_distance(projected, target, True, 1.5)
    parts = [squared_distance(projected[part], target[part], True, 1.5) for part in (slice(2), slice(2, 6))]
    torch.testing.assert_close(whole, torch.cat(parts))
    scaled = squared_distance(30 * projected, 30 * target, True)
    torch.testing.assert_close(scaled, squared_distance(projected, target, True))


def test_a_massive_activation_is_left_out() -> None:
    torch.manual_seed(0)
    projected, target = torch.randn(2, 1, 8, 16, dtype=torch.float64)
    huge = target.clone()
    huge[0, 3, 5] = 1e6
    one_less = (projected - target).square()
    one_less[0, 3, 5] = 0
    assert squared_distance(projected, huge).item() > 1e9
    assert squared_distance(projected, huge, within_deviations=2).item() == pytest.approx(
        one_less.sum().item() / (8 * 16 - 1), rel=1e-12
    )


@pytest.mark.parametrize("family", MODELS)
def test_every_term_of_a_joint_model_trains_and_checkpointing_changes_nothing(family: str) -> None:
    teacher, student = MODELS[family]
    freeze(teacher)
    names = [name for name, term in TERMS.items() if term.captures is not None]
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            student.enable_gradient_checkpointing()
        student.train().zero_grad()
        terms = {name: built(name, teacher, student, weight=1.0) for name in names}
        with TrainingLoss(PROCESS, terms, student, teacher, 10) as loss:
            values = loss(student, batch(), 0)
            torch.stack(list(values.values())).sum().backward()
        assert list(values) == names and all(value.isfinite() for value in values.values())
        for parameters in (terms[name].parameters() for name in names):
            assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)
        found.append({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
    student.disable_gradient_checkpointing()
    assert (
        found[0].keys()
        == found[1].keys()
        == {n for n, _ in student.named_parameters()} - traced(student).unreached
    )
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-12, atol=1e-12)


def test_a_projector_for_so_many_tokens_is_not_for_text() -> None:
    with pytest.raises(
        ValueError, match=r"blocks\.0:\d has those of prompts of any length; set `streams: \[image\]`"
    ):
        built("features", *MODELS["sd3"], projector="attention")
    term = built("features", *MODELS["sd3"], projector="attention", streams=["image"])
    assert term(outputs_of(term, *MODELS["sd3"])).item() > 0


def test_modules_without_a_stream_in_common() -> None:
    teacher, student = traced(MODELS["flux"][0]), traced(MODELS["sd3"][1])
    odd = {name: output for name, output in teacher.outputs.items() if name != f"{BLOCK}.1:1"}
    teacher = replace(teacher, outputs=odd)
    features = TERMS["features"]
    with pytest.raises(
        ValueError, match=rf"^{BLOCK}\.1 puts out tokens of the image, the teacher's .*text: there are no"
    ):
        features(features.Config(layer_map={f"{BLOCK}.1.attn": f"{BLOCK}.1.attn"}), student, teacher)
