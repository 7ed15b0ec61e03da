"""`sample`: images from the pipeline of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from shd_diffusion.config import RunConfig, SampleConfig
from shd_diffusion.data import open_dataset
from shd_diffusion.data.prepare import EncodeConfig
from shd_diffusion.errors import UserError
from shd_diffusion.files import check_outside
from shd_diffusion.processes import processes
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling.archive import write_archive
from shd_diffusion.sampling.by_class import OF_PROMPTS, ByClass
from shd_diffusion.sampling.by_prompt import ByPrompt
from shd_diffusion.sampling.execution import denoiser_of, set_execution, try_execution
from shd_diffusion.sampling.generate import generate_images
from shd_diffusion.sampling.image_sampler import ImageSampler
from shd_diffusion.sampling.layouts import check_layout, write_layout
from shd_diffusion.sampling.open_pipeline import hash_pipeline, open_pipeline
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline
from shd_diffusion.sampling.prompts import Prompt, read_prompts
from shd_diffusion.sampling.schedulers import check_sampling, check_sampling_by_prompt, own_scheduler


def sample_run(
    run: RunFolder, config: RunConfig, folder: Path, npz: bool = False, layout: str | None = None
) -> dict[str, Any]:
    """Sample `config.sample.num_images` images into a folder, continuing what is there.

    Args:
        npz: also write them all into one file, see `write_archive`.
        layout: also write them as the scorer of a benchmark takes them, see `write_layout`; then `num_images` is of no
            account, as all prompts are sampled.

    Returns:
        The content of `sampling.json`.

    Raises:
        UserError: the run is not complete, its pipeline is damaged, its samples have another protocol, or they cannot
            be sampled so.
    """
    prompts: list[Prompt] = []
    if layout is not None:
        prompts = _prompts_of_layout(layout, config.sample)
        count = len(prompts) * config.sample.images_per_prompt
        config = config.model_copy(update={"sample": config.sample.model_copy(update={"num_images": count})})
    check_outside(folder, config.reads)
    train, summary = run.read_config().train, run.read_summary()
    trained: dict[str, Any] = {"steps_trained": summary.steps, "ema_decay": train.ema_decay}
    # a checkpoint, or a run that was stopped
    if summary.steps != train.max_steps and summary.stage != "compress":
        trained["steps_planned"] = train.max_steps
    pipeline = open_pipeline(str(run.finished_pipeline()), config.sample.dtype)
    name, source = str(run.path), str(run.config_file)
    sampled = sample_pipeline(pipeline, config.sample, folder, trained, name, source, run_config=config)
    if npz and processes().is_main_process:
        write_archive(folder)
    if layout is not None and processes().is_main_process:
        write_layout(layout, folder, prompts)
    return sampled


def _prompts_of_layout(layout: str, config: SampleConfig) -> list[Prompt]:
    """The prompts of a benchmark, which its scorer can use.

    Raises:
        UserError: it cannot, or there are none.
    """
    if config.prompts is None:
        raise UserError(f"--layout {layout}: needs the prompts of the benchmark; give them by --prompts")
    prompts = read_prompts(Path(config.prompts))
    check_layout(layout, prompts, config.images_per_prompt, config.prompts)
    return prompts


def sample_pipeline(
    pipeline: DiffusionPipeline,
    config: SampleConfig,
    folder: Path,
    protocol: dict[str, Any],
    name: str,
    source: str,
    run_config: RunConfig | None = None,
) -> dict[str, Any]:
    """As `generate_images`, by class or by prompts, on the device of this process, by these very weights.

    Args:
        run_config: whose data have the prompts, where `config` names none, and the size of the images.

    Raises:
        UserError: they cannot be sampled so, which is told as of `source`, or the folder has other samples.
    """
    try:
        set_scheduler(pipeline, config)
        sampler = make_sampler(pipeline, config, run_config)
    except (UserError, ValueError) as error:
        raise UserError(f"{source}: {error}") from error
    protocol = {**protocol, "pipeline_sha256": hash_pipeline(pipeline)}
    pipeline.to(processes().device)
    try:
        set_execution(denoiser_of(pipeline), config)
        try_execution(sampler, config.pass_size, config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return generate_images(sampler, config, folder, protocol, name)


def set_scheduler(pipeline: DiffusionPipeline, config: SampleConfig) -> None:
    """Give a pipeline the scheduler of the config, if that names one, and see that it can sample.

    Raises:
        UserError: it cannot, or diffusers has no such scheduler.
    """
    if isinstance(pipeline, ClassConditionalPipeline):
        pipeline.scheduler = check_sampling(config, pipeline.scheduler, own_scheduler)
    else:
        pipeline.scheduler = check_sampling_by_prompt(config, pipeline.scheduler)


def make_sampler(
    pipeline: DiffusionPipeline, config: SampleConfig, run_config: RunConfig | None
) -> ImageSampler:
    """What makes the images of a pipeline: by class, or by prompts.

    Raises:
        UserError: there are no prompts, or the pipeline takes no such arguments.
    """
    if isinstance(pipeline, ClassConditionalPipeline):
        if wrong := sorted(OF_PROMPTS & config.changed()):
            raise UserError(f"key `sample.{wrong[0]}`: the pipeline makes images by class; remove it")
        return ByClass(pipeline, config)
    size = None if run_config is None else run_config.data.image_size
    if run_config is not None and run_config.prepare is not None:
        config = with_prompt_arguments(config, run_config.prepare)
    return ByPrompt(pipeline, config, prompts_of(config, run_config), None if size is None else (size, size))


def with_prompt_arguments(config: SampleConfig, prepare: EncodeConfig) -> SampleConfig:
    """The call of a pipeline by which it reads prompts as the model has learnt from them."""
    told = prepare.prompt_arguments | config.pipeline_arguments
    return config.model_copy(update={"pipeline_arguments": told})


def prompts_of(config: SampleConfig, run_config: RunConfig | None) -> Sequence[str]:
    """The prompts of a file, or the first captions of the data, as many as images need.

    Raises:
        UserError: there are none.
    """
    if config.prompts is not None:
        return [prompt.text for prompt in read_prompts(Path(config.prompts))]
    if run_config is None:
        raise UserError("key `sample.prompts` is missing: a text-to-image pipeline needs them; give a file")
    images = open_dataset(run_config.data)
    wanted = -(-config.num_images // config.images_per_prompt)
    if not images.captions(0):
        raise UserError(
            "key `data.caption_column` is missing, so the data have no prompts; add it, or set `sample.prompts`"
        )
    return [images.captions(index)[0] for index in islice(range(len(images)), wanted)]
