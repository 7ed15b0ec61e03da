"""Every family of text-to-image pipelines with half of its heads and neurons: what it is then good for."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from test_prompts import as_latents, spy
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE
from torch import Tensor

import shd_diffusion.models  # the names of squeezed classes, for `from_pretrained`
from shd_diffusion.attention import attention_blocks
from shd_diffusion.attention.blocks import LINEAR
from shd_diffusion.compression import CompressedModel, compress, importance
from shd_diffusion.compression.budget import Budget, plan_shape
from shd_diffusion.compression.costs import cost_of
from shd_diffusion.compression.walk import first_sample
from shd_diffusion.losses import LossesConfig, build_terms
from shd_diffusion.losses.term import Batch
from shd_diffusion.models.denoiser import freeze, pad, predict, prepare
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.layouts import feed_forwards, head_layout
from shd_diffusion.models.pipeline_folder import find_pipeline
from shd_diffusion.models.prompt_words import prompt_words
from shd_diffusion.models.prompts import PromptEncoder, denoiser_name, load_for_prompts
from shd_diffusion.models.trace import trace
from shd_diffusion.training.objectives import TrainingLoss

PROMPTS = ["a cat", "a red fox jumps"]
HEADS = 4
# one pipeline of each class of denoiser
NAMES = sorted({*PIPELINES} - {"sd2", "pixart-alpha", "sd3", "flux-schnell"})


class Squeezed(NamedTuple):
    """A pipeline, calibration batches for its denoiser, and that with half of its heads and neurons."""

    pipeline: DiffusionPipeline
    teacher: ModelMixin
    batches: list[Any]
    found: CompressedModel


def draw_batches(name: str, pipeline: DiffusionPipeline, count: int) -> list[tuple[Tensor, Tensor, Any]]:
    """Noise at several timesteps, with prompts of different lengths."""
    arguments = ARGUMENTS.get(name, {})
    condition = pad(PromptEncoder(pipeline, SIZE, arguments).encode(PROMPTS))
    latents = as_latents(pipeline, spy(pipeline, prompt=PROMPTS[0], **arguments)[0]["sample"])
    draw = torch.Generator().manual_seed(0)
    shape = len(PROMPTS), *latents.shape[1:]
    timesteps = torch.tensor([300.0, 800.0])
    return [(torch.randn(shape, generator=draw), timesteps, condition) for _ in range(count)]


@cache
def squeezed(name: str) -> Squeezed:
    pipeline = PIPELINES[name](heads=HEADS)
    batches = draw_batches(name, pipeline, 2)
    teacher = prepare(getattr(pipeline, denoiser_name(pipeline)))
    return Squeezed(pipeline, teacher, batches, compress(teacher, batches, predict, heads=2, neurons=0.5))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_all_heads_and_all_neurons_are_the_teacher(name: str) -> None:
    _, teacher, batches, _ = squeezed(name)
    found = compress(teacher, batches[:1], predict, heads=HEADS, neurons=1.0)
    assert type(found.model) is type(teacher) and found.parts == () and found.lost < 1e-10
    expected = predict(teacher, *batches[1])
    error = (predict(found.model, *batches[1]) - expected).norm() / expected.norm()
    assert error < 1e-5 and expected.norm() > 0


@pytest.mark.parametrize("name", NAMES)
def test_half_of_all_heads_and_neurons_are_left_and_lose_little(name: str) -> None:
    _, teacher, _, found = squeezed(name)
    blocks = attention_blocks(teacher)
    heads = {name for name, block in blocks.items() if block.reason != LINEAR}
    assert heads and feed_forwards(teacher)
    assert {part.name for part in found.parts} == heads | set(feed_forwards(teacher))
    assert all(part.after == part.before // 2 for part in found.parts)
    assert all(part.lost <= part.lost_before + 1e-6 for part in found.parts if part.what == "heads")
    assert found.lost < 0.15  # of 1, what a model that predicts 0 loses


def save_both(pipeline: DiffusionPipeline, found: CompressedModel, root: Path) -> None:
    """The pipeline as `teacher`, and with the compressed model as `small`."""
    pipeline.save_pretrained(root / "teacher")
    folder = find_pipeline(str(root / "teacher"))
    assert folder is not None
    folder.save_with(found.model, root / "small")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_stands_in_the_pipeline_and_samples(name: str, tmp_path: Path) -> None:
    pipeline, _, batches, found = squeezed(name)
    save_both(pipeline, found, tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "small")
    denoiser = getattr(loaded, denoiser_name(loaded))
    assert type(denoiser) is getattr(shd_diffusion.models.squeezed, type(found.model).__name__)
    prepare(denoiser)
    assert torch.equal(predict(denoiser, *batches[0]), predict(found.model, *batches[0]))
    loaded.set_progress_bar_config(disable=True)
    size = {"height": SIZE[0], "width": SIZE[1], "num_inference_steps": 2}
    image = loaded(prompt=["a cat"], output_type="pt", **size, **ARGUMENTS.get(name, {}))[0][0]
    assert image.isfinite().all() and image.std() > 0


@pytest.mark.parametrize("name", NAMES)
def test_it_is_prepared_for_as_its_teacher_is(name: str, tmp_path: Path) -> None:
    """It may teach in its turn."""
    pipeline, _, _, found = squeezed(name)
    save_both(pipeline, found, tmp_path)
    arguments = ARGUMENTS.get(name, {})
    encoded, words = [], []
    for path in (str(tmp_path / "teacher"), str(tmp_path / "small")):
        loaded = load_for_prompts(path)
        assert getattr(loaded, denoiser_name(loaded)).device.type == "meta"
        encoded.append(pad(PromptEncoder(loaded, SIZE, arguments).encode(PROMPTS)))
        words.append(prompt_words(path, PROMPTS[0], SIZE, arguments))
    assert words[0] == words[1] and encoded[0].keys() == encoded[1].keys()
    assert all(torch.equal(encoded[0][key], encoded[1][key]) for key in encoded[0])


@pytest.mark.parametrize("name", ["sd1.5", "pixart-sigma", "sd3.5", "flux-dev", "lumina2"])
@torch.no_grad()
def test_a_budget_is_kept_by_what_comes_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "STEPS", 4)  # to be quick
    _, teacher, batches, _ = squeezed(name)
    one = first_sample(batches)
    plan = plan_shape(teacher, batches, predict, Budget("macs", 0.9), one)
    found = compress(teacher, batches, predict, **plan.arguments)
    cost = cost_of(found.model, "macs", lambda: predict(found.model, *one))
    assert cost == pytest.approx(plan.after, rel=1e-12) and cost <= 0.9 * plan.before
    assert {(part.name, part.keeps) for part in plan.parts} == {
        (part.name, part.after) for part in found.parts
    }
    assert found.lost < 0.15
    found.model.save_pretrained(tmp_path)
    loaded = prepare(type(found.model).from_pretrained(tmp_path))
    assert torch.equal(predict(loaded, *batches[0]), predict(found.model, *batches[0]))
    whole = plan_shape(teacher, batches, predict, Budget("parameters", 1), one)
    assert whole.parts == () and whole.arguments == {"heads": None, "neurons": None, "blocks": None}


@pytest.mark.parametrize("name", NAMES)
def test_it_takes_a_step_of_distillation(name: str) -> None:
    pipeline, teacher, batches, found = squeezed(name)
    noised, timesteps, condition = batches[0]
    one = {key: value[:1] for key, value in condition.items()}
    student = copy.deepcopy(found.model).train()
    traces = [trace(model, tuple(noised.shape[1:]), one) for model in (student, teacher)]
    losses = {"denoise": {"weight": 0.0}, "variance": {"weight": 0.0}, "output": {"weight": 1.0}, "shd": {}}
    terms = build_terms(LossesConfig.model_validate(losses), *traces, seed=0)
    process = ForwardProcess.from_scheduler(pipeline.scheduler)
    batch = Batch(torch.randn_like(noised), torch.randn_like(noised), noised, timesteps, condition)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with TrainingLoss(process, terms, student, freeze(teacher), 10) as loss:
        values = loss(student, batch, 0)
    assert {"output", "shd"} == values.keys() and all(value.isfinite() for value in values.values())
    sum(values.values()).backward()
    optimizer.step()
    before, after = found.model.state_dict(), student.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    for part in found.parts:
        if part.what == "heads":
            weight = f"{head_layout(student, part.name).queries[0].layer}.weight"
            assert not torch.equal(after[weight], before[weight]), part.name
