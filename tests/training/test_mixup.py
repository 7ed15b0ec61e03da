"""Mixed images: what is mixed with what, by how much, and who sees it."""

from __future__ import annotations

import pytest
import torch
from commands import DISTILL_CONFIG
from small_models import small_dit

from shd_diffusion.config import DistillConfig, TrainConfig, read_config
from shd_diffusion.data.datasets import build_source
from shd_diffusion.models.denoiser import predict
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.randomness import generator
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import build
from shd_diffusion.training.objectives import TrainingLoss


def test_terms_with_a_teacher_see_mixed_images_and_the_others_see_them_as_they_are() -> None:
    overrides = ["train.batch_size=3", "train.mixup=true", "train.warmup_steps=0", "losses.shd.weight=0"]
    config = read_config(DISTILL_CONFIG, DistillConfig, [*overrides, "student.arguments.num_layers=2"])
    teacher = small_dit(12, layers=2)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    parts = build(config, "here", build_source(config.data), Teacher(teacher.eval()))
    for parameter in parts.model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    student = parts.model.eval()
    with TrainingLoss(parts.process, parts.terms, student, teacher, 10) as loss, torch.no_grad():
        ((batch, _),) = parts.loader(torch.device("cpu"))(BatchLayout(3), 0).step(0)
        found = loss(student, batch, 0)
    errors: dict[str, list[float]] = {"denoise": [], "output": []}
    for place in range(3):
        share = torch.rand((), generator=generator(config.seed, "mixup", 0, place)).item()
        mixed = share * batch.clean[place] + (1 - share) * batch.clean[place - 1]
        timestep, noise = batch.timesteps[place : place + 1], batch.noise[place : place + 1]
        label = {name: value[place : place + 1] for name, value in batch.condition.items()}
        seen = parts.process.noised(mixed[None], noise, timestep)
        with torch.no_grad():
            plain = predict(student, batch.noised[place : place + 1], timestep, label)
            own, target = (predict(model, seen, timestep, label) for model in (student, teacher))
        errors["denoise"].append((plain - noise).square().mean().item())
        errors["output"].append((own - target).square().mean().item())
    assert set(found) == {"denoise", "output"}
    for name, values in errors.items():
        assert found[name].item() == pytest.approx(sum(values) / 3, rel=1e-4)


def test_mixed_and_masked_passes_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="`mixup` and `mask_ratio`"):
        TrainConfig(max_steps=1, batch_size=1, mixup=True, mask_ratio=0.3)
