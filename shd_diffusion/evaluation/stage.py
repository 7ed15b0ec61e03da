"""`evaluate`: the figures of a run's samples."""

from __future__ import annotations

from typing import Any

from shd_diffusion.config import RunConfig
from shd_diffusion.data import reference_images
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation.evaluate import evaluate_run
from shd_diffusion.files import read_json, write_json
from shd_diffusion.run_folder import RunFolder


def evaluate_samples(run: RunFolder, config: RunConfig) -> dict[str, Any]:
    """Evaluate the images in a run's `samples/` against its data set and keep the figures with the run.

    Returns:
        The content of `evaluation/metrics.json`.

    Raises:
        UserError: there are no samples, or they cannot be evaluated.
    """
    summary = run.samples / "sampling.json"
    if not summary.exists():
        raise UserError(f"{run.path}: has no samples yet; run `shd-diffusion sample {run.path}` first")
    sampled = read_json(summary)
    figures = evaluate_run(
        run.samples,
        config.evaluate.reference or reference_images(config.data),
        config.evaluate,
        labels=sampled["labels"],
        protocol=sampled["protocol"],
    )
    write_json(run.evaluation_file, figures)
    return figures
