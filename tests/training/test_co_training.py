"""A teacher that trains too: by its own regression, at its own rate, and what a checkpoint keeps of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import DISTILL_CONFIG
from small_models import small_dit
from torch import Tensor

from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.data.datasets import build_source
from shd_diffusion.errors import UserError
from shd_diffusion.models.denoiser import predict
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import Parts, build
from shd_diffusion.training.checkpoints import CheckpointFolder
from shd_diffusion.training.launch import make_accelerator
from shd_diffusion.training.loop import fit
from shd_diffusion.training.objectives import TrainingLoss

RATE, STEPS = 1e-2, 4
OVERRIDES = [
    *(
        f"teacher.learning_rate={RATE}",
        "train.lr_schedule=constant",
        "train.warmup_steps=0",
        "train.batch_size=3",
    ),
    *("student.arguments.num_layers=2", "train.condition_dropout=0", "train.max_grad_norm=1e9"),
    *(f"train.max_steps={STEPS}", "train.checkpoint_every=2"),
]


def parts_of(*more: str) -> Parts:
    config = read_config(DISTILL_CONFIG, DistillConfig, [*OVERRIDES, *more])
    torch.manual_seed(0)
    return build(
        config, "here", build_source(config.data), Teacher(small_dit(12).eval().requires_grad_(False))
    )


def train(
    parts: Parts, folder: RunFolder, steps: int, rate: float | None = RATE
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Student and teacher after so many steps."""
    assert parts.teacher is not None
    config = parts.config.model_copy(
        update={"train": parts.config.train.model_copy(update={"max_steps": steps})}
    )
    folder.create(config, {})
    accelerator = make_accelerator(config.train, folder.path)
    loss = TrainingLoss(parts.process, parts.terms, parts.model, parts.teacher.model, STEPS, rate)
    with loss:
        checkpoints = CheckpointFolder(folder.checkpoints, folder.identity(config), accelerator, keep_last=1)
        start = checkpoints.latest(steps)
        fit(parts.model, loss, parts.loader(accelerator.device), folder, config, accelerator, start)
    return parts.model.state_dict(), parts.teacher.model.state_dict()


def test_it_learns_its_own_regression_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole, again = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "again")
    expected = parts_of()
    assert expected.teacher is not None
    teacher = expected.teacher.model
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=RATE, weight_decay=0)
    for step in range(STEPS):
        ((batch, _),) = expected.loader(torch.device("cpu"))(BatchLayout(3), step).step(step)
        prediction = predict(teacher, batch.noised, batch.timesteps, batch.condition)
        (prediction - batch.noise).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    student, found = train(parts_of(), whole, STEPS)
    for name, weight in teacher.state_dict().items():  # clipping sums squares in another order
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)
    train(parts_of(), again, 2)
    resumed = train(parts_of(), again, STEPS)
    for ours, theirs in zip(resumed, (student, found), strict=True):
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def test_neither_gradient_is_clipped_for_the_others_sake(tmp_path: Path) -> None:
    clipped = "train.max_grad_norm=1e-3"
    (with_teacher, taught), (alone, _) = (
        train(parts_of(clipped), RunFolder(tmp_path / str(rate)), 1, rate) for rate in (RATE, None)
    )
    assert all(torch.equal(weight, with_teacher[name]) for name, weight in alone.items())
    parts = parts_of()
    assert parts.teacher is not None
    before = parts.teacher.model.state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in taught.items())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.shard=true", "train.shard"),
        ("teacher.device=cpu", "teacher.device"),
        ("train.mix=mixup", "train.mix"),
    ],
)
def test_what_it_cannot_train_with_is_refused(override: str, told: str) -> None:
    with pytest.raises(UserError, match=rf"^here: key `teacher.learning_rate`: .*`{told}`"):
        parts_of(override)
