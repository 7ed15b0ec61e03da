"""A teacher and a student of different architectures: a UNet and a DiT, one step of every term that is for them."""

from __future__ import annotations

import pytest
import torch
from commands import ROOT
from diffusers import ModelMixin
from small_models import small_dit

from shd_diffusion.config import DistillConfig, TrainTeacherConfig, read_config
from shd_diffusion.data.datasets import build_source
from shd_diffusion.models.factory import build_model
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import build
from shd_diffusion.training.objectives import TrainingLoss

DIGITS = ROOT / "configs" / "digits"
TERMS = ("shd", "features", "attention_output", "minilm", "affinity", "contrastive")


def unet() -> ModelMixin:
    torch.manual_seed(0)
    return build_model(read_config(DIGITS / "unet-teacher.yaml", TrainTeacherConfig).model)


@pytest.mark.parametrize("student", ["unet-to-dit.yaml", "unet-distill.yaml"])
def test_a_step(student: str) -> None:
    teacher = unet() if student == "unet-to-dit.yaml" else small_dit(12, layers=2)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    overrides = ["train.batch_size=2", *(f"losses.{name}.weight=1" for name in TERMS)]
    config = read_config(DIGITS / student, DistillConfig, overrides)
    parts = build(config, "here", build_source(config.data), Teacher(teacher.eval()))
    with TrainingLoss(parts.process, parts.terms, parts.model, teacher, 10) as loss:
        ((batch, _),) = parts.loader(torch.device("cpu"))(BatchLayout(2), 0).step(0)
        terms = loss(parts.model.train(), batch, 0)
        torch.stack(list(terms.values())).sum().backward()
    assert set(terms) == {"denoise", "output", *TERMS} and all(term.isfinite() for term in terms.values())
    assert all(terms[name] > 0 for name in TERMS)
    tokens = {record.query.shape[2] for record in parts.teacher_trace.records.values()}
    assert tokens != {record.query.shape[2] for record in parts.student_trace.records.values()}
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())
