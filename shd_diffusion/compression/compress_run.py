"""`compress`: a smaller pipeline from a trained one, without training, and what each part of it lost."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from rich.table import Table

from shd_diffusion.compression.attention import HeadOptions, Method
from shd_diffusion.compression.compress import Batch, CompressedModel, Counts, Part, compress
from shd_diffusion.config import RunConfig
from shd_diffusion.data import LatentSource, Source, build_source
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.files import holds_files, replacing_folder, write_json, write_text
from shd_diffusion.models.denoiser import count_parameters, null_condition, predict
from shd_diffusion.models.factory import TeacherConfig
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.pipeline_folder import PipelineFolder
from shd_diffusion.models.teacher import load_teacher, scheduler_for
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce
from shd_diffusion.sampling import save_pipeline
from shd_diffusion.training.batches import (
    BatchLayout,
    StepSampler,
    draw_noise,
    make_batch,
    noise_settings,
)
from shd_diffusion.training.build import conditions_of

README = """# A compressed model

Made by `shd-diffusion compress {teacher}` without training: {shape}. `compression.json` says what each part lost.

{load}
"""
OWN = """The class of its denoiser is `{name}`, for heads or neurons that its stock class cannot have. Install
shd-diffusion, and load it by `{pipeline}.from_pretrained` after `import shd_diffusion.models`, or train it by
`student: {{pretrained: …}}`."""
STOCK = "Its denoiser is a plain diffusers `{name}`."


def compress_run(
    path: str,
    config: RunConfig,
    output: Path,
    heads: Counts = None,
    neurons: Counts = None,
    blocks: int | None = None,
    images: int = 1024,
    plain: bool = False,
    method: Method = "merge",
) -> dict[str, Any]:
    """Compress a trained model, calibrated on data that are noised as in training, and save it in its kind of pipeline.

    Args:
        path: of the teacher: a run, a pipeline or model folder, or a hub name.
        config: of the teacher's run, or of one that trains on the same kind of data.
        output: the pipeline's folder.
        heads: see `compress`.
        neurons: see `compress`.
        blocks: see `compress`.
        images: to calibrate on.
        plain: see `compress`.
        method: see `HeadOptions`.

    Returns:
        The content of `compression.json`.

    Raises:
        UserError: there is no such model, the data are missing, or it cannot be made so small.
    """
    if holds_files(output):
        raise UserError(f"--output {output}: holds files already; give another")
    teacher = load_teacher(TeacherConfig(path=path))
    model, source = teacher.model.to(processes().device), build_source(config.trained_on)
    source.condition_names = conditions_of(model, source)
    scheduler = scheduler_for(config.diffusion, teacher.scheduler, False)
    process = ForwardProcess.from_scheduler(scheduler)
    batches = calibration_batches(config, model, source, process, images)
    before = count_parameters(model)
    try:
        options = HeadOptions(method=method)
        found = compress(model, batches, predict, heads, neurons, blocks, options, plain, report=_tell)
    except ValueError as error:
        raise UserError(f"{path}: cannot be compressed so: {error}") from error
    vae = None
    if (
        isinstance(source, LatentSource) and source.prompts_sha256 is None
    ):  # a pipeline by prompts has its own
        vae = source.load_vae()
    results = {
        "teacher": path,
        "images": images,
        "method": method,
        "parameters": {"before": before, "after": count_parameters(found.model)},
        "lost": found.lost,
        "parts": [asdict(part) for part in found.parts],
        "environment": describe_environment(),
    }
    with replacing_folder(output) as temporary:
        save_pipeline(found.model, teacher.pipeline, scheduler, vae, source.shape, temporary)
        write_json(temporary / "compression.json", results)
        write_text(temporary / "README.md", _readme(path, teacher.pipeline, found))
    return results


def calibration_batches(
    config: RunConfig, model: ModelMixin, source: Source, process: ForwardProcess, images: int, size: int = 64
) -> list[Batch]:
    """Training data as a run sees them, noised and with conditions dropped, but of steps that it never takes."""
    train, null = config.train, {**null_condition(model), **source.null}
    settings = noise_settings(train, source)
    sampler = StepSampler(config.seed, source.groups, BatchLayout(size), 0, max(1, images // size))
    found = []
    for step, items in enumerate(source.batches(sampler)):
        of_these = replace(settings, shape=source.shape_of(items))
        noise = draw_noise(config.seed, -1 - step, range(size), of_these)
        batch = make_batch(source, process, items, noise, null, model.device)
        found.append((batch.noised, batch.timesteps, dict(batch.condition)))
    return found


def table(results: dict[str, Any]) -> Table:
    """What each part lost, a line each, for a terminal."""
    sizes = results["parameters"]
    rendered = Table(
        title=f"{sizes['before']:,} → {sizes['after']:,} parameters; the prediction lost {results['lost']:.5f}",
        title_justify="left",
    )
    for column in ("part", "what", "before", "after", "lost before the refit", "lost"):
        rendered.add_column(column, justify="left" if column in ("part", "what") else "right")
    for part in results["parts"]:
        numbers = f"{part['lost_before']:.5f}", f"{part['lost']:.5f}"
        rendered.add_row(part["name"], part["what"], str(part["before"]), str(part["after"]), *numbers)
    return rendered


def _tell(part: Part) -> None:
    announce(f"{part.name}: {part.before} → {part.after} {part.what}, lost {part.lost:.5f}")


def _readme(path: str, pipeline: PipelineFolder | None, found: CompressedModel) -> str:
    name = type(found.model).__name__
    by_prompt = pipeline is not None and pipeline.takes_prompts
    kind = "diffusers.DiffusionPipeline" if by_prompt else "shd_diffusion.sampling.ClassConditionalPipeline"
    load = (OWN if name.startswith("Squeezed") else STOCK).format(name=name, pipeline=kind)
    shape = f"{count_parameters(found.model):,} parameters"
    return README.format(teacher=path, shape=shape, load=load)
