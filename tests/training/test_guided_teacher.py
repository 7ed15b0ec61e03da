"""A guided teacher in a run: where the null condition comes from, and models that have none."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from commands import DISTILL_CONFIG
from small_models import small_dit

from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.data.datasets import build_source
from shd_diffusion.errors import UserError
from shd_diffusion.models.denoiser import drop_condition
from shd_diffusion.models.factory import build_model
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import build
from shd_diffusion.training.objectives import TrainingLoss

GUIDED = [
    "train.batch_size=2",
    "losses.output.guidance_scale=2",
    "losses.shd.weight=0",
    "losses.denoise.weight=0",
]


def test_where_every_condition_is_dropped_guidance_changes_nothing() -> None:
    found = []
    teacher = small_dit(4, layers=1)
    torch.nn.init.normal_(teacher.proj_out_2.weight, std=0.1)
    for more in ([], ["losses.output.guidance_scale=null"]):
        changes = [*GUIDED, *more, "student.arguments.num_layers=1", "train.condition_dropout=0"]
        config = read_config(DISTILL_CONFIG, DistillConfig, changes)
        parts = build(config, "here", build_source(config.data), Teacher(teacher.eval()))
        with TrainingLoss(parts.process, parts.terms, parts.model.eval(), teacher, 10) as loss:
            ((batch, _),) = parts.loader(torch.device("cpu"))(BatchLayout(2), 0).step(0)
            dropped = drop_condition(batch.condition, batch.null, torch.ones(2, dtype=torch.bool))
            for condition in (batch.condition, dropped):
                seen = replace(batch, condition=condition)
                found.append(loss(parts.model, seen, 0)["output"].item())
    (guided, guided_null), (plain, plain_null) = found[:2], found[2:]
    assert guided_null == pytest.approx(plain_null, rel=1e-5)
    assert abs(guided / plain - 1) > 1e-4


def test_models_without_a_condition_cannot_be_guided() -> None:
    arguments = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "norm_num_groups": 4,
    }  # fmt: skip
    changes = [*GUIDED, "student.class=UNet2DModel", f"student.arguments={json.dumps(arguments)}"]
    config = read_config(DISTILL_CONFIG, DistillConfig, changes)
    with pytest.raises(
        UserError, match=r"key `losses\.output\.guidance_scale`: the models have no condition"
    ):
        build(config, "here", build_source(config.data), Teacher(build_model(config.student)))
