"""`evaluate`: the metrics of a run's samples, of a pipeline that is sampled first, or of any images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shd_diffusion.config import (
    EvaluateConfig,
    EvaluationConfig,
    RunConfig,
    check_read,
    override_config,
    paths_read,
)
from shd_diffusion.data import DataConfig, ReferenceImages, reference_images
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.against_teacher_run import compare_with_teacher
from shd_diffusion.evaluation.evaluate import compute_metrics, load_models
from shd_diffusion.evaluation.extractors import extractor_name
from shd_diffusion.evaluation.images import FolderImages
from shd_diffusion.evaluation.metrics import check_settings, needs_reference, without_reference
from shd_diffusion.evaluation.references import data_of
from shd_diffusion.files import check_outside, locked, read_as, write_json
from shd_diffusion.model_card import write_card
from shd_diffusion.models.hub import is_hub_name
from shd_diffusion.processes import processes
from shd_diffusion.progress import announce
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sample_folder import Summary, image_path, read_summary
from shd_diffusion.sampling.archive import ARCHIVE
from shd_diffusion.sampling.open_pipeline import open_pipeline
from shd_diffusion.sampling.sample_run import sample_pipeline


def evaluate_run(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Evaluate the images in a run's `samples/` against its data set and keep the metrics with the run.

    Returns:
        The content of `evaluation/metrics.json`.

    Raises:
        UserError: there are no samples, or they cannot be evaluated.
    """
    sampled = read_summary(run.samples)
    if sampled is None or not sampled.num_images:
        raise UserError(f"{run.path}: has no finished samples; run `shd-diffusion sample {run.path}` first")
    sampled_at = sampled.protocol.get("steps_trained")
    if sampled_at is not None and sampled_at != (steps := run.read_summary().steps):
        raise UserError(
            f"{run.samples}: its images are of step {sampled_at}, and the run has come to {steps} since; delete the "
            f"folder, and run `shd-diffusion sample {run.path}`"
        )
    settings, reference = config.evaluate, config.evaluate.reference or _reference_of(config)
    if reference is None:
        settings = without_reference(settings)
    name = extractor_name(settings.extractor, config.data.name)
    settings = settings.model_copy(update={"extractor": name})
    found = {}
    if settings.against_teacher:
        extractor, _ = load_models(settings, None)
        found["against_teacher"] = compare_with_teacher(run, config, sampled, extractor)
    metrics = _evaluate_and_keep(run, reference, settings, found)
    # compress writes other words
    has_card = (run.pipeline / "README.md").exists() and run.pipeline != run.path
    if processes().is_main_process and has_card:
        write_card(run)
    return metrics


def _reference_of(config: RunConfig) -> ReferenceImages | None:
    """The images of the data set; None where there are none, or no metric needs them."""
    if config.evaluate.metrics is None and config.data.name == "prompts":
        return None
    if config.evaluate.metrics is not None and not needs_reference(config.evaluate):
        return None
    return reference_images(config.trained_on, config.data)


def evaluate_images(images: Path, overrides: list[str]) -> dict[str, Any]:
    """Evaluate a folder of images or an .npz of the ADM suite that no run has made.

    A `sampling.json` beside them is heeded.

    Raises:
        UserError: there are no images, no reference was given, or they cannot be evaluated.
    """
    if not images.exists():
        raise UserError(f"{images}: no such run, pipeline, folder of images or .npz file")
    config = override_config(EvaluationConfig(), overrides, "--set").evaluate
    check_read(overrides, ("evaluate",), "the images are there")
    return _evaluate(images, _given_reference(str(images), config), config)


def is_pipeline(name: str) -> bool:
    """Whether this is a folder of a diffusers pipeline, or could be the hub name of one."""
    path = Path(name)
    return (path / "model_index.json").is_file() if path.exists() else is_hub_name(name)


def evaluate_pipeline(name: str, overrides: list[str], output: Path | None = None) -> dict[str, Any]:
    """Sample a diffusers pipeline and evaluate the images; the same call again continues.

    Args:
        name: its folder, or its name on the hub.
        overrides: of an `EvaluationConfig`; the scheduler is the pipeline's own unless they say otherwise.
        output: gets `samples/` and `evaluation/metrics.json`; default: `NAME-evaluation` beside the folder, or
            `runs/OWNER--NAME` for a hub name.

    Returns:
        The content of `evaluation/metrics.json`.

    Raises:
        UserError: the pipeline cannot be had or sampled by class, or its images cannot be evaluated.
    """
    # Whatever can be seen to be wrong before hours of sampling.
    config = override_config(EvaluationConfig(), overrides, "--set")
    reference = _given_reference(name, config.evaluate)
    settings = config.evaluate if reference is not None else without_reference(config.evaluate)
    check_settings(settings, data_of(reference))
    load_models(settings, data_of(reference))

    place = RunFolder(output or _default_output(name))
    check_outside(place.path, {"PIPELINE": name, **paths_read(config.model_dump(mode="json"))})
    with processes().local_main_process_first():
        pipeline = open_pipeline(name, config.sample.dtype)
    sample_pipeline(pipeline, config.sample, place.samples, {}, name, "--set")
    return _evaluate_and_keep(place, reference, settings)


def _default_output(name: str) -> Path:
    folder = Path(name).resolve()
    return (
        folder.with_name(f"{folder.name}-evaluation")
        if folder.exists()
        else Path("runs", name.replace("/", "--"))
    )


def _given_reference(name: str, config: EvaluateConfig) -> str | DataConfig | None:
    if config.against_teacher:
        raise UserError(f"{name}: is no run of `distill`, so `evaluate.against_teacher` must be 0")
    if config.reference is None and needs_reference(config):
        raise UserError(
            f"{name}: is no run here, so the images to compare with must be given: --reference REF"
        )
    return config.reference


def _evaluate_and_keep(
    place: RunFolder, reference: Any, config: EvaluateConfig, further: dict[str, Any] | None = None
) -> dict[str, Any]:
    nearest = place.evaluation_file.with_name("nearest.json")
    metrics = _evaluate(place.samples, reference, config, nearest) | (further or {})
    if processes().is_main_process:
        with locked(place.evaluation_file.parent):
            if place.evaluation_file.exists():
                before = read_as(place.evaluation_file, dict[str, Any])
                if gone := sorted(before.keys() - metrics.keys()):
                    announce(f"{place.evaluation_file}: replaced; it had {', '.join(gone)} too")
            write_json(place.evaluation_file, metrics)
    return metrics


def _evaluate(
    images: Path, reference: Any, config: EvaluateConfig, nearest: Path | None = None
) -> dict[str, Any]:
    """Metrics of the images there; of our own samples those that are finished, as a sampling may be going on."""
    folder = images.parent if images.name == ARCHIVE else images
    sampled = read_summary(folder) or Summary()
    finished = [image_path(folder, index) for index in range(sampled.num_images)]
    return compute_metrics(
        FolderImages(folder, finished) if finished and images == folder else images,
        reference,
        config,
        sampled.labels,
        sampled.protocol,
        nearest,
        sampled.prompts,
    )
