"""Pipelines and runs of random weights: finished, but never trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from commands import TEACHER_CONFIG
from diffusers import DDPMScheduler
from small_models import small_dit

from shd_diffusion.config import TrainTeacherConfig, dump_config, read_config
from shd_diffusion.files import write_text
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling import ClassConditionalPipeline, make_scheduler
from shd_diffusion.summary import Summary


def random_dit_pipeline(
    scheduler: str = "DDIMScheduler", seed: int = 0, heads: int = 2
) -> ClassConditionalPipeline:
    """Of a DiT that predicts something: adaLN-zero would predict exactly nothing."""
    model, generator = small_dit(heads, layers=1).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    # so few and small betas that no division by a tiny signal makes all pixels black or white
    trained_with = DDPMScheduler(num_train_timesteps=50, clip_sample=False)
    pipeline = ClassConditionalPipeline(
        model, make_scheduler(scheduler, {}, trained_with), sample_shape=[1, 8, 8]
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_summary(folder: Path, stage: Literal["train-teacher", "distill"], steps: int) -> None:
    """As a training of so many steps; of its model it says nothing true."""
    summary = Summary(
        name=folder.name,
        stage=stage,
        class_name="Any",
        parameters=5,
        heads=2,
        blocks=1,
        steps=steps,
        images=steps,
    )
    RunFolder(folder).write_summary(summary)


def finished_run(folder: Path, seed: int = 0, heads: int = 2) -> Path:
    """A run folder with a pipeline of random weights."""
    random_dit_pipeline(seed=seed, heads=heads).save_pretrained(folder / "pipeline")
    write_text(folder / "config.yaml", dump_config(read_config(TEACHER_CONFIG, TrainTeacherConfig)))
    write_summary(folder, "train-teacher", 20)
    return folder
