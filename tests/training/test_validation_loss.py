"""The loss on fixed samples while a model trains: what it is, and the same for any dealing, dropout and step."""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from commands import DISTILL_CONFIG, TEACHER_CONFIG, command, sets
from diffusers import DDPMScheduler, ModelMixin
from safetensors.torch import load_file
from small_models import small_dit

from shd_diffusion.data import ImageSource
from shd_diffusion.data.digits import digits
from shd_diffusion.losses import TERMS, Term
from shd_diffusion.models.denoiser import freeze, null_condition, predict
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.trace import trace
from shd_diffusion.randomness import generator
from shd_diffusion.sampling import ClassConditionalPipeline
from shd_diffusion.training.batches import NoiseSettings
from shd_diffusion.training.objectives import TrainingLoss
from shd_diffusion.training.validation_loss import (
    deal,
    fixed_batches,
    make_validation_loss,
    spread,
    sum_terms,
)

SOURCE = ImageSource(digits())
PROCESS = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))
SETTINGS = NoiseSettings(SOURCE.shape)
CPU = torch.device("cpu")


def test_items_lie_evenly_over_the_data() -> None:
    assert spread(4, [range(10)], 8) == [[0, 2, 5, 7]]
    assert spread(5, [range(6), range(6, 10)], 2) == [[0], [2, 4], [6, 8]]  # passes of one group each
    assert spread(99, [range(2), range(2, 5)], 3) == [[0, 1], [2, 3, 4]]
    assert [len(items) for items in spread(33, [range(33)], 32)] == [16, 17]  # none of them alone


@pytest.mark.parametrize(("passes", "processes"), [(4, 1), (4, 2), (5, 2), (1, 3), (7, 4)])
def test_every_pass_counts_once_and_all_processes_take_equally_many(passes: int, processes: int) -> None:
    dealt = [deal([[0]] * passes, process, processes) for process in range(processes)]
    assert len({len(mine) for mine in dealt}) == 1
    assert sorted(number for mine in dealt for number, counts in mine if counts) == list(range(passes))


# --- what it is --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models() -> tuple[ModelMixin, ModelMixin]:
    """Teacher and student, every parameter random."""
    found = []
    for heads, layers in ((4, 3), (2, 2)):
        torch.manual_seed(heads)
        model = small_dit(heads, layers=layers)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        found.append(model.eval())
    return freeze(found[0]), found[1]


def build(models: tuple[ModelMixin, ModelMixin], **options: dict[str, object]) -> TrainingLoss:
    teacher, student = models
    traces = [trace(model, SOURCE.shape, null_condition(model)) for model in (student, teacher)]
    terms: dict[str, Term] = {
        name: TERMS[name](TERMS[name].Config.model_validate({"weight": 1.0, **given}), *traces)
        for name, given in {"denoise": {}, "output": {}, **options}.items()
    }
    return TrainingLoss(PROCESS, terms, student, teacher, 10)


def validated(
    loss: TrainingLoss, student: ModelMixin, settings: NoiseSettings = SETTINGS, count: int = 7, size: int = 3
) -> dict[str, object]:
    null = null_condition(student)
    validate = make_validation_loss(loss, SOURCE, settings, 0, count, size, Accelerator(cpu=True), null)
    with loss:
        metrics, picture = validate(student)
    assert picture is None
    return metrics


def test_it_is_the_mean_over_the_samples(models: tuple[ModelMixin, ModelMixin]) -> None:
    """In float64, sample by sample, from the images, the labels and the schedule of diffusers."""
    student = models[1]
    shd = build(models, shd={"weight": 0.5})
    found = validated(shd, student)
    cumulative = DDPMScheduler(**SCHEDULE).alphas_cumprod.double()
    both = [type(model).from_config(model.config).double().eval() for model in models]
    for copy, model in zip(both, models, strict=True):
        copy.load_state_dict(model.state_dict())
    errors: dict[str, list[float]] = {"denoise": [], "output": [], "teacher": []}
    images = digits()
    for place in range(7):
        item = place * len(images) // 7
        clean = images.image(item).double() / 127.5 - 1
        source = generator(0, "sample", "validation", place)
        torch.rand(3, generator=source, dtype=torch.float64)
        noise = torch.randn(clean.shape, generator=source).double()
        timestep = int((0.5 + place * (np.sqrt(5) - 1) / 2) % 1 * 1000)
        noised = cumulative[timestep].sqrt() * clean + (1 - cumulative[timestep]).sqrt() * noise
        label = {"class_labels": torch.tensor([int(images.labels[item])])}
        with torch.no_grad():
            target, prediction = (predict(m, noised[None], torch.tensor([timestep]), label)[0] for m in both)
        errors["denoise"].append((prediction - noise).square().mean().item())
        errors["output"].append((prediction - target).square().mean().item())
        errors["teacher"].append((target - noise).square().mean().item())
    assert found["teacher"] == {"denoise": pytest.approx(np.mean(errors.pop("teacher")), rel=1e-5)}
    terms = found["terms"]
    assert isinstance(terms, dict) and list(terms) == ["denoise", "output", "shd"]
    for name, values in errors.items():
        assert terms[name] == pytest.approx(np.mean(values), rel=1e-5)
    assert found["loss"] == pytest.approx(terms["denoise"] + terms["output"] + 0.5 * terms["shd"], rel=1e-6)


SCHEDULE = dict(make_scheduler_of_process(DiffusionConfig()).config)


def shares(loss: TrainingLoss, student: ModelMixin, processes: int) -> dict[str, float]:
    """What so many processes find together."""
    passes = spread(7, SOURCE.groups, 2)
    total: dict[str, torch.Tensor] = {}
    with loss, torch.no_grad():
        for process in range(processes):
            dealt = deal(passes, process, processes)
            batches: Iterable = fixed_batches(
                SOURCE, PROCESS, SETTINGS, 0, CPU, passes, [number for number, _ in dealt], {}
            )
            sums = sum_terms(
                (loss.plain(student, batch), len(batch.clean) * counts)
                for batch, (_, counts) in zip(batches, dealt, strict=True)
            )
            assert list(sums) == list(loss.terms)  # those whose passes do not count have the terms too
            total = {name: total.get(name, 0) + value for name, value in sums.items()}
    return {name: float(value) / 7 for name, value in total.items()}


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_processes_find_together_what_one_finds(
    processes: int, models: tuple[ModelMixin, ModelMixin]
) -> None:
    loss = build(models, shd={}, features={"normalise": True}, vkd={})
    alone = shares(loss, models[1], 1)
    assert shares(loss, models[1], processes) == pytest.approx(alone, rel=1e-6)
    assert validated(loss, models[1], size=2)["terms"] == pytest.approx(alone, rel=1e-6)


def test_neither_dropout_nor_the_step_nor_the_size_of_passes_matters(
    models: tuple[ModelMixin, ModelMixin],
) -> None:
    loss = build(models, shd={"every": 3, "decay": "linear", "rows": 0.5})
    found = validated(loss, models[1])
    dropped = NoiseSettings(SOURCE.shape, condition_dropout=0.99, timestep_sampling="logit_normal")
    assert validated(loss, models[1], dropped) == found
    (batch,) = fixed_batches(SOURCE, PROCESS, dropped, 0, CPU, spread(64, SOURCE.groups, 64), [0], {})
    assert (batch.condition["class_labels"] < 10).all()
    assert batch.timesteps.double().sort().values.diff().max() < 1000 / 64 * 2  # all of the schedule
    with loss:
        for step in (1, 8):
            loss(models[1], batch, step)  # as training does between two validations
    assert validated(loss, models[1]) == found
    alone = TrainingLoss(PROCESS, {"denoise": loss.terms["denoise"]}, models[1], None, 10)
    assert "teacher" not in validated(alone, models[1])
    sizes = [validated(loss, models[1], size=size)["terms"] for size in (1, 7)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-5)


def test_a_guided_teacher_is_what_is_trained_on(models: tuple[ModelMixin, ModelMixin]) -> None:
    """‖x − (y₀ + w (y₁ − y₀))‖² as in training, y₀ without a label, y₁ with it."""
    teacher, student = models
    found = validated(build(models, output={"guidance_scale": 3.0}), student)
    (batch,) = fixed_batches(SOURCE, PROCESS, SETTINGS, 0, CPU, spread(7, SOURCE.groups, 7), [0], {})
    with torch.no_grad():
        without, by_label = (
            predict(teacher, batch.noised, batch.timesteps, {"class_labels": labels})
            for labels in (torch.full((7,), 10), batch.condition["class_labels"])
        )
        prediction = predict(student, batch.noised, batch.timesteps, batch.condition)
    expected = (prediction - (without + 3 * (by_label - without))).square().mean().item()
    plain = (prediction - by_label).square().mean().item()
    assert found["terms"]["output"] == pytest.approx(expected, rel=1e-5) and expected > 1.01 * plain


def test_a_teacher_that_trains_too_is_measured_anew(models: tuple[ModelMixin, ModelMixin]) -> None:
    teacher = deepcopy(models[0])
    null = null_condition(teacher)
    for rate, changes in ((None, False), (0.1, True)):
        loss = build((teacher, models[1]))
        loss.teacher_rate = rate
        validate = make_validation_loss(loss, SOURCE, SETTINGS, 0, 4, 4, Accelerator(cpu=True), null)
        with loss, torch.no_grad():
            before = validate(models[1])[0]["teacher"]
            teacher.proj_out_2.weight.mul_(2)
            assert (validate(models[1])[0]["teacher"] != before) == changes


# --- in a run ----------------------------------------------------------------------------------------------------

SHORT = ["train.max_steps=4", "train.batch_size=4", "train.log_every=1", "train.ema_decay=0.5"]
SMALL = ["arguments.num_layers=1", "arguments.num_attention_heads=2"]
VALIDATION = ["train.validation.every=2", "train.validation.num_images=0", "train.validation.loss_images=5"]


def entries(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]


def test_a_teacher_and_a_student_are_validated_without_a_trace(tmp_path: Path) -> None:
    teacher = sets(*SHORT, *(f"model.{one}" for one in SMALL))
    student = sets(*SHORT, *(f"student.{one}" for one in SMALL), f"teacher.path={tmp_path / 'teacher'}")
    for stage, config, given, terms in (
        ("train-teacher", TEACHER_CONFIG, teacher, {"denoise"}),
        ("distill", DISTILL_CONFIG, student, {"denoise", "output", "shd"}),
    ):
        name = stage.rpartition("-")[2]
        watched, plain = tmp_path / name, tmp_path / f"{name}-plain"
        assert command(stage, config, "--output", watched, *given, *sets(*VALIDATION))[0] == 0
        assert command(stage, config, "--output", plain, *given)[0] == 0
        log = entries(watched)
        found = {entry["step"]: entry.pop("validation") for entry in log if "validation" in entry}
        assert list(found) == [2, 4] and all(each["terms"].keys() == terms for each in found.values())
        assert [each.get("teacher") for each in found.values()] == 2 * [found[2].get("teacher")]
        assert ("teacher" in found[2]) == (stage == "distill")
        assert log == entries(plain) and not (watched / "validation").exists()
        weights = "pipeline/denoiser/diffusion_pytorch_model.safetensors"
        ours, theirs = load_file(watched / weights), load_file(plain / weights)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        if stage == "train-teacher":  # the averaged weights, which are those of the pipeline
            model = ClassConditionalPipeline.from_pretrained(watched / "pipeline").denoiser.eval()
            denoise = TERMS["denoise"](
                TERMS["denoise"].Config(), trace(model, SOURCE.shape, null_condition(model)), None
            )
            loss = TrainingLoss(PROCESS, {"denoise": denoise}, model, None, 4)
            again = validated(loss, model, count=5, size=4)
            assert found[4]["terms"]["denoise"] == pytest.approx(again["terms"]["denoise"], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["train.validation.num_images=0", "train.validation.loss_images=0"], ["nothing to measure", "loss_images"]),
        (["train.validation.num_images=1"], ["2 at least"]),
        (["train.validation.loss_images=-1"], ["train.validation.loss_images"]),
    ],
)  # fmt: skip
def test_a_validation_of_nothing(given: list[str], says: list[str], tmp_path: Path) -> None:
    arguments = sets(*SHORT, "train.validation.every=2", *given)
    code, _, errors = command("train-teacher", TEACHER_CONFIG, "--output", tmp_path / "run", *arguments)
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and "teacher.yaml: key `train.validation" in message[0]
    assert all(part in message[0] for part in says) and not (tmp_path / "run").exists()
