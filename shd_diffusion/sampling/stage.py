"""`sample`: images from the pipeline of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shd_diffusion.config import RunConfig, SampleConfig
from shd_diffusion.errors import UserError
from shd_diffusion.processes import processes
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling.archive import write_archive
from shd_diffusion.sampling.generate import generate, make_scheduler
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline


def sample_run(run: RunFolder, config: RunConfig, folder: Path, npz: bool = False) -> dict[str, Any]:
    """Sample `config.sample.num_images` images into a folder, continuing what is there.

    Args:
        npz: also write them all into one file, see `write_archive`.

    Returns:
        The content of `sampling.json`.

    Raises:
        UserError: the run is not complete, its samples have another protocol, or the scheduler is unknown.
    """
    summary = run.read_summary()
    pipeline = ClassConditionalPipeline.from_pretrained(run.pipeline)
    protocol = {"steps_trained": summary["steps"], "ema_decay": config.train.ema_decay}
    name, source = run.path.name, str(run.config_file)
    sampled = sample_pipeline(pipeline, config.sample, folder, protocol, name, source)
    if npz and processes().is_main_process:
        write_archive(folder)
    return sampled


def sample_pipeline(
    pipeline: ClassConditionalPipeline,
    config: SampleConfig,
    folder: Path,
    protocol: dict[str, Any],
    name: str,
    source: str,
) -> dict[str, Any]:
    """As `generate`, with the scheduler of the config, on the device of this process.

    Raises:
        UserError: the scheduler is unknown, which is told as of `source`, or the folder has other samples.
    """
    try:
        pipeline.scheduler = make_scheduler(config.scheduler, config.scheduler_arguments, pipeline.scheduler)
    except ValueError as error:
        raise UserError(f"{source}: key `sample.scheduler`: {error}") from error
    pipeline.to(processes().device)
    return generate(pipeline, config, folder, protocol, name)
