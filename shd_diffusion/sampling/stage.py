"""`sample`: images from the pipeline of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shd_diffusion.config import RunConfig
from shd_diffusion.errors import UserError
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling.generate import generate, make_scheduler
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline


def sample_run(run: RunFolder, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Sample `config.sample.num_images` images into a folder, continuing what is there.

    Returns:
        The content of `sampling.json`.

    Raises:
        UserError: the run is not complete, its samples have another protocol, or the scheduler is unknown.
    """
    summary = run.read_summary()
    pipeline = ClassConditionalPipeline.from_pretrained(run.pipeline)
    try:
        pipeline.scheduler = make_scheduler(
            config.sample.scheduler, config.sample.scheduler_arguments, pipeline.scheduler
        )
    except ValueError as error:
        raise UserError(f"{run.config_file}: key `sample.scheduler`: {error}") from error
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    protocol = {"steps_trained": summary["steps"], "ema_decay": config.train.ema_decay}
    return generate(pipeline, config.sample, folder, protocol, run.path.name)
