"""Prompts of different lengths in one batch: predictions, traces, and the losses of each family."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE
from torch import Tensor

from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.data.latent_space import LatentSpace
from shd_diffusion.losses import TERMS, SHDLoss, Term
from shd_diffusion.losses.padding import with_text_mask
from shd_diffusion.losses.term import Batch
from shd_diffusion.models.denoiser import freeze, pad, predict, prepare
from shd_diffusion.models.families import TEXT_MASK
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.prompts import PromptEncoder, denoiser_name
from shd_diffusion.models.trace import trace
from shd_diffusion.training.objectives import TrainingLoss

PROMPTS = ["a cat", "a red fox jumps over two dozing dogs and cats"]  # 16 and 48 tokens to CogView4
ALL = list(PIPELINES)


@cache
def drawn(name: str) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    """Noised samples, timesteps, and a short and a long prompt's conditions."""
    pipeline = PIPELINES[name]()
    conditions = PromptEncoder(pipeline, SIZE, ARGUMENTS.get(name, {})).encode(PROMPTS)
    torch.manual_seed(1)
    shape = LatentSpace(pipeline.vae).parts(torch.zeros(1, 3, *SIZE))[0].shape[1:]
    if name == "wan":
        shape = (shape[0], 2, *shape[2:])
    return (
        torch.randn(2, *shape, dtype=torch.float64),
        torch.tensor([250, 700]),
        [doubled(c) for c in conditions],
    )


def doubled(condition: dict[str, Tensor]) -> dict[str, Tensor]:
    """So that no difference is rounding: a batch's sums may be taken in another order."""
    return {n: entry.double() if entry.is_floating_point() else entry for n, entry in condition.items()}


@cache
def denoiser(name: str, heads: int = 4) -> ModelMixin:
    pipeline = PIPELINES[name](heads=heads, seed=heads)
    return freeze(prepare(getattr(pipeline, denoiser_name(pipeline)).double()))


def of_one(name: str, index: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    noised, timesteps, conditions = drawn(name)
    return noised[index : index + 1], timesteps[index : index + 1], pad(conditions[index : index + 1])


def of_both(name: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    noised, timesteps, conditions = drawn(name)
    return noised, timesteps, pad(conditions)


def records(model: ModelMixin, batch: tuple[Any, ...]) -> dict[str, AttentionRecord]:
    with AttentionCapture(model) as capture:
        predict(model, *batch)
        return capture.records


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_batch_predicts_what_each_sample_does_alone(name: str) -> None:
    model = denoiser(name)
    both = predict(model, *of_both(name))
    for index in range(2):
        alone = predict(model, *of_one(name, index))
        torch.testing.assert_close(both[index : index + 1], alone, rtol=1e-5, atol=1e-5)
    assert (both[0] - both[1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["flux2", "qwen-image", "lumina2", "hunyuan-dit", "cogview4", "z-image"])
def test_a_pass_can_be_traced(name: str) -> None:
    model, (noised, timesteps, condition) = denoiser(name), of_one(name, 1)
    found = trace(model, tuple(noised.shape[1:]), condition)
    present = records(model, (noised, timesteps, condition))
    assert {n: (r.query.shape, r.key.shape) for n, r in found.records.items()} == {
        n: (r.query.shape, r.key.shape) for n, r in present.items() if n in found.records
    }
    texts = [n for n in present if n.endswith(":context")]
    assert present.keys() - found.records.keys() <= set(texts[-1:])  # text that ends in the last block


@pytest.mark.parametrize("name", ["sd3.5", "flux-dev", "flux2", "auraflow", "chroma"])
@torch.no_grad()
def test_padded_text_is_found_in_every_block_that_has_its_rows(name: str) -> None:
    """What the rows of padding hold changes no loss, although the model attends to them."""
    batch = of_both(name)
    mask = batch[2][TEXT_MASK]
    teacher, student, loss = denoiser(name), denoiser(name, heads=2), SHDLoss()
    of_teacher, of_student = (with_text_mask(records(model, batch), batch[2]) for model in (teacher, student))
    with_rows = [n for n, record in of_teacher.items() if record.query.shape[2] >= mask.shape[1]]
    marked = {
        n for n, record in of_teacher.items() if record.counted is not None and not record.counted.all()
    }
    assert {n for n in with_rows if ":context" in n or "single" in n} == marked and not mask.all()
    for name in marked:
        assert torch.equal(of_teacher[name].counted[:, : mask.shape[1]], mask)
    other = {
        name: record
        if record.counted is None
        else replace(record, query=record.query.masked_fill(~record.counted[:, None, :, None], 5.0))
        for name, record in of_teacher.items()
    }
    assert torch.equal(loss(of_teacher, of_student), loss(other, of_student))


@pytest.mark.parametrize("name", ALL)
def test_the_shd_loss_of_a_batch_is_the_mean_of_each_alone(name: str) -> None:
    teacher, student, loss = denoiser(name), denoiser(name, heads=2), SHDLoss()
    student.requires_grad_(True)

    def of(batch: tuple[Any, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            of_teacher = with_text_mask(records(teacher, batch), batch[2])
        student.zero_grad()
        value = loss(of_teacher, with_text_mask(records(student, batch), batch[2]))
        value.backward()
        gradients = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
        return value.detach(), {n: g.clone() for n, g in gradients.items()}

    (both, gradients), *alone = of(of_both(name)), of(of_one(name, 0)), of(of_one(name, 1))
    assert both.isfinite() and both > 0
    torch.testing.assert_close(both, (alone[0][0] + alone[1][0]) / 2, rtol=1e-5, atol=0)
    assert gradients.keys() == alone[0][1].keys() and any(g.any() for g in gradients.values())
    means = {n: (alone[0][1][n] + alone[1][1][n]) / 2 for n in gradients}
    largest = max(float(mean.abs().max()) for mean in means.values())
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, means[parameter], rtol=1e-5, atol=1e-7 * largest)


PADDED = ["qwen-image", "chroma", "cogview4", "lumina2", "z-image"]
"""Families whose text tokens attend too, and may be of padding."""


@pytest.mark.parametrize("name", PADDED)
def test_the_feature_terms_of_a_batch_are_the_mean_of_each_alone(name: str) -> None:
    teacher, student = denoiser(name), denoiser(name, heads=2)
    shape, (_, _, condition) = tuple(drawn(name)[0].shape[1:]), of_one(name, 1)
    traces = [trace(model, shape, condition) for model in (student, teacher)]
    process = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig(objective="flow")))
    terms: dict[str, Term] = {}
    for term, options in (
        ("features", {"normalise": True, "within_deviations": 2.0}),
        ("attention_output", {}),
        ("vkd", {"normalisation": "standardise"}),
    ):
        torch.manual_seed(0)
        terms[term] = TERMS[term](TERMS[term].Config(weight=1, **options), *traces).double()
        assert terms[term].rows

    def of(noised: Tensor, timesteps: Tensor, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        return loss(student, Batch(noised, noised, noised, timesteps, condition), 0)

    with TrainingLoss(process, terms, student, teacher, 10) as loss, torch.no_grad():
        both, *alone = of(*of_both(name)), of(*of_one(name, 0)), of(*of_one(name, 1))
    for term, found in both.items():
        torch.testing.assert_close(found, (alone[0][term] + alone[1][term]) / 2, rtol=1e-9, atol=0)
