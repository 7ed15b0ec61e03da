"""`sample`: images from the pipeline of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shd_diffusion.config import RunConfig, SampleConfig
from shd_diffusion.errors import UserError
from shd_diffusion.processes import processes
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling.archive import write_archive
from shd_diffusion.sampling.generate import generate_images
from shd_diffusion.sampling.open_pipeline import hash_pipeline, open_pipeline
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline
from shd_diffusion.sampling.schedulers import check_sampling, make_scheduler


def sample_run(run: RunFolder, config: RunConfig, folder: Path, npz: bool = False) -> dict[str, Any]:
    """Sample `config.sample.num_images` images into a folder, continuing what is there.

    Args:
        npz: also write them all into one file, see `write_archive`.

    Returns:
        The content of `sampling.json`.

    Raises:
        UserError: the run is not complete, its pipeline is damaged, its samples have another protocol, or they cannot
            be sampled so.
    """
    trained = {"steps_trained": run.read_summary()["steps"], "ema_decay": run.read_config().train.ema_decay}
    pipeline = open_pipeline(str(run.pipeline))
    name, source = str(run.path), str(run.config_file)
    sampled = sample_pipeline(pipeline, config.sample, folder, trained, name, source)
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
    """As `generate_images`, with the scheduler of the config, on the device of this process, by these very weights.

    Raises:
        UserError: they cannot be sampled so, which is told as of `source`, or the folder has other samples.
    """
    try:
        check_sampling(config, pipeline.scheduler)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    pipeline.scheduler = make_scheduler(config.scheduler, config.scheduler_arguments, pipeline.scheduler)
    protocol = {**protocol, "pipeline_sha256": hash_pipeline(pipeline)}
    pipeline.to(processes().device)
    return generate_images(pipeline, config, folder, protocol, name)
