"""Where the gradients of a step go: to the student and to the parameters of the loss, and to nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import DISTILL_CONFIG
from small_models import small_dit

from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.data import build_source
from shd_diffusion.losses import TERMS
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import build
from shd_diffusion.training.launch import make_accelerator
from shd_diffusion.training.loop import take_step
from shd_diffusion.training.objectives import TrainingLoss
from shd_diffusion.training.run import place_models
from shd_diffusion.training.train_state import TrainState

OVERRIDES = [
    *("student.arguments.num_layers=2", "train.batch_size=4", "train.warmup_steps=0"),
    *(f"losses.{name}.weight=1" for name, term in TERMS.items() if term.captures is not None),
]


def test_they_reach_the_student_and_the_projectors_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(DISTILL_CONFIG, DistillConfig, OVERRIDES)
    teacher = small_dit(12)  # not even frozen
    parts = build(config, "here", build_source(config.data), Teacher(teacher))
    accelerator = make_accelerator(config.train, tmp_path)
    place_models(parts, accelerator)
    loss = TrainingLoss(parts.process, parts.terms, parts.model, teacher, config.train.max_steps)
    state = TrainState.prepare(parts.model, loss.parameters(), config.train, accelerator)
    monkeypatch.setattr(state.optimizer, "zero_grad", lambda: None)
    before = [shadow.clone() for shadow in state.ema.shadow_params]
    layout = BatchLayout(config.train.batch_size)
    with loss:
        batches = parts.loader(accelerator.device)(layout, 0).step(0)
        take_step(state, loss, batches, layout.num_passes, 0, config.train, accelerator)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(shadow.grad is None and not shadow.requires_grad for shadow in state.ema.shadow_params)
    assert all(value.grad is None and not value.requires_grad for value in parts.null.values())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in loss.parameters())
    silent = [name for name, p in parts.model.named_parameters() if p.grad is None]
    assert silent == []
    queries = parts.model.get_submodule("transformer_blocks.0.attn1.to_q").weight
    assert queries.grad is not None and queries.grad.abs().max() > 0
    moved = [not torch.equal(old, new) for old, new in zip(before, state.ema.shadow_params, strict=True)]
    assert any(moved)  # the average follows the weights, not the gradients


def test_a_projector_rests_until_its_term_counts(tmp_path: Path) -> None:
    """Neither decayed nor stepped on before, so that AdamW's bias correction begins with its own first gradient."""
    off = [f"losses.{name}.weight=0" for name, term in TERMS.items() if term.captures is not None]
    options = ["losses.features.weight=1", "losses.features.during=[0.5, 1]", "train.max_steps=4"]
    changes = [*OVERRIDES[:2], *off, *options, "train.weight_decay=1", "train.lr_schedule=constant"]
    config = read_config(DISTILL_CONFIG, DistillConfig, changes)
    teacher = small_dit(12).requires_grad_(False)
    parts = build(config, "here", build_source(config.data), Teacher(teacher))
    accelerator = make_accelerator(config.train, tmp_path)
    place_models(parts, accelerator)
    loss = TrainingLoss(parts.process, parts.terms, parts.model, teacher, 4)
    state = TrainState.prepare(parts.model, loss.parameters(), config.train, accelerator)
    layout, weights = BatchLayout(4), [p.detach().clone() for p in loss.parameters()]
    moved = []
    with loss:
        loader = parts.loader(accelerator.device)(layout, 0)
        for step in range(4):
            take_step(state, loss, loader.step(step), 1, step, config.train, accelerator)
            pairs = zip(loss.parameters(), weights, strict=True)
            moved.append(any(not torch.equal(now, first) for now, first in pairs))
    assert moved == [False, False, True, True]
    counts = {int(state.optimizer.state[p]["step"]) for p in loss.parameters()}
    assert counts == {2}
