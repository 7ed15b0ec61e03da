"""Mixed images: what is mixed with what, by how much, and who sees it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from commands import DISTILL_CONFIG
from small_models import small_dit
from torch import Tensor

from shd_diffusion.config import DistillConfig, TrainConfig, read_config
from shd_diffusion.data.datasets import build_source
from shd_diffusion.models.denoiser import predict
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.randomness import generator
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import build
from shd_diffusion.training.objectives import TrainingLoss


def mixed_up(image: Tensor, before: Tensor, source: torch.Generator) -> Tensor:
    share = torch.rand((), generator=source).item()
    return share * image + (1 - share) * before


def with_a_box(image: Tensor, before: Tensor, source: torch.Generator) -> Tensor:
    """Yun et al. 2019, equations 1 and 2, pixel by pixel."""
    share, down, right = torch.rand(3, generator=source).tolist()
    _, height, width = image.shape
    cut, mixed = (1 - share) ** 0.5, image.clone()
    for row in range(height):
        for column in range(width):
            below = abs(row + 0.5 - down * height) < height * cut / 2
            if below and abs(column + 0.5 - right * width) < width * cut / 2:
                mixed[:, row, column] = before[:, row, column]
    return mixed


@pytest.mark.parametrize(
    ("mix", "made", "name", "candidates"),
    [
        ("mixup", mixed_up, "mixup", 1),
        ("cutmix", with_a_box, "cutmix", 1),
        ("cutmix_pick", with_a_box, "cutmix", 2),
    ],
)
def test_terms_with_a_teacher_see_mixed_images_and_the_others_see_them_as_they_are(
    mix: str, made: Callable[..., Tensor], name: str, candidates: int
) -> None:
    overrides = ["train.batch_size=3", f"train.mix={mix}", "train.warmup_steps=0", "losses.shd.weight=0"]
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
        source = generator(config.seed, name, 0, place)
        images = [made(batch.clean[place], batch.clean[place - 1], source) for _ in range(candidates)]
        timestep, noise = batch.timesteps[place : place + 1], batch.noise[place : place + 1]
        label = {name: value[place : place + 1] for name, value in batch.condition.items()}
        distances = []
        with torch.no_grad():
            plain = predict(student, batch.noised[place : place + 1], timestep, label)
            for image in images:
                seen = parts.process.noised(image[None], noise, timestep)
                own, target = (predict(model, seen, timestep, label) for model in (student, teacher))
                distances.append((own - target).square().mean().item())
        errors["denoise"].append((plain - noise).square().mean().item())
        errors["output"].append(max(distances))
    assert set(found) == {"denoise", "output"}
    for term, values in errors.items():
        assert found[term].item() == pytest.approx(sum(values) / 3, rel=1e-4)


def test_mixed_and_masked_passes_exclude_each_other_and_earlier_configs_are_read() -> None:
    with pytest.raises(ValueError, match="`mix` and `mask_ratio`"):
        TrainConfig(max_steps=1, batch_size=1, mix="cutmix", mask_ratio=0.3)
    read = [
        TrainConfig.model_validate({"max_steps": 1, "batch_size": 1, "mixup": old}).mix
        for old in (True, False)
    ]
    assert read == ["mixup", "none"]
    with pytest.raises(ValueError, match="write `mix: mixup`"):
        TrainConfig.model_validate({"max_steps": 1, "batch_size": 1, "mixup": "yes"})
