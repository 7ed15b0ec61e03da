"""`evaluate`: the figures of a run's samples, or of any folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from shd_diffusion.config import EvaluateConfig, RunConfig, override_config
from shd_diffusion.data import reference_images
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.evaluate import evaluate_run
from shd_diffusion.files import read_json, write_json
from shd_diffusion.processes import processes
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling.archive import ARCHIVE
from shd_diffusion.sampling.generate import SUMMARY


def evaluate_samples(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Evaluate the images in a run's `samples/` against its data set and keep the figures with the run.

    Returns:
        The content of `evaluation/metrics.json`.

    Raises:
        UserError: there are no samples, or they cannot be evaluated.
    """
    record = run.samples / SUMMARY
    if not record.exists() or not read_json(record)["num_images"]:
        raise UserError(f"{run.path}: has no finished samples; run `shd-diffusion sample {run.path}` first")
    reference = config.evaluate.reference or reference_images(config.data)
    figures = _evaluate(run.samples, reference, config.evaluate)
    if processes().is_main_process:
        write_json(run.evaluation_file, figures)
    return figures


class _Options(BaseModel):
    evaluate: EvaluateConfig = EvaluateConfig(extractor="inception-v3-compat")


def evaluate_images(images: Path, overrides: list[str]) -> dict[str, Any]:
    """Evaluate a folder of images or an .npz of the ADM suite that no run of ours has made.

    Args:
        images: where they are; the `sampling.json` beside our own samples is heeded.
        overrides: of the `evaluate` section; the extractor is Inception unless they say otherwise.

    Raises:
        UserError: there are no images, no reference was given, or they cannot be evaluated.
    """
    if not images.exists():
        raise UserError(f"{images}: no such run, folder of images or .npz file")
    config = override_config(_Options(), overrides, "--set").evaluate
    if config.reference is None:
        raise UserError(f"{images}: is no run, so the images to compare with must be given: --reference REF")
    return _evaluate(images, config.reference, config)


def _evaluate(images: Path, reference: Any, config: EvaluateConfig) -> dict[str, Any]:
    folder = images.parent if images.name == ARCHIVE else images
    record = folder / SUMMARY
    sampled = read_json(record) if record.exists() else {}
    return evaluate_run(
        images, reference, config, labels=sampled.get("labels"), protocol=sampled.get("protocol")
    )
