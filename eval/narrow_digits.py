"""Launch file: a narrow digits student from random and from squeezed weights, before and after training, and what parts
of the squeezing pay.

python eval/narrow_digits.py --output docs/results/narrow-digits/results.json
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from shd_diffusion.compression.compress import block_plans
from shd_diffusion.compression.narrow import squeeze_into
from shd_diffusion.config import DistillConfig, override_config, read_config
from shd_diffusion.data.datasets import build_source, reference_images
from shd_diffusion.environment import describe_environment
from shd_diffusion.evaluation.evaluate import compute_metrics
from shd_diffusion.files import read_json, write_json, write_text
from shd_diffusion.models.denoiser import predict
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling.open_pipeline import open_pipeline
from shd_diffusion.sampling.sample_run import sample_pipeline
from shd_diffusion.squeezing.channels import Reader
from shd_diffusion.squeezing.plan import PLANS_FILE, plans_to_json
from shd_diffusion.training.build import build
from shd_diffusion.training.calibration import calibration_batches
from shd_diffusion.training.run import train


def largest_channels(readers: Sequence[Reader], keep: int, groups: int) -> torch.Tensor:
    """Those of greatest variance, each reader's in shares of its whole."""
    shares = torch.stack([reader.gram.diagonal() / reader.gram.trace() for reader in readers]).sum(0)
    return shares.topk(keep).indices.sort().values


# Arguments of `squeeze_into`; None: random weights.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "random": None,
    "squeeze": {},
    "largest channels": {"choose": largest_channels},
    "no refit": {"refit": False},
    "largest channels, no refit": {"choose": largest_channels, "refit": False},
}


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the results; those in it stay.")],
    config: Annotated[Path, typer.Option(help="Of the distillation.")] = Path("configs/digits/distill.yaml"),
    teacher: Annotated[str, typer.Option(help="Run or pipeline folder.")] = "runs/digits/teacher",
    variant: Annotated[list[str] | None, typer.Option(help="Some of the variants.")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Of training, each from the start.")] = None,
    only_start: Annotated[bool, typer.Option(help="Train nothing; only say what the start lost.")] = False,
    seed: Annotated[list[int] | None, typer.Option(help="Of student, noise and samples.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="As for `distill`.")] = None,
) -> None:
    """Build, train, sample and evaluate each."""
    results: dict[str, Any] = read_json(output)["results"] if output.exists() else {}
    for number in seed or [0]:
        for name in variant or list(VARIANTS):
            with TemporaryDirectory() as folder:
                settings = read_config(
                    config,
                    DistillConfig,
                    [f"teacher.path={teacher}", f"seed={number}", f"sample.seed={number}", *(set_ or [])],
                )
                start = Path(folder) / "student"
                found = results.setdefault(f"{name}, seed {number}", {})
                found |= _begin(settings, name, start)
                write_json(output, {"results": results, "environment": describe_environment()})
                for count in [] if only_start else steps or [0, 150, 500]:
                    run = Path(folder) / f"run-{count}"
                    found[f"{count} steps"] = _measure(settings, start, count, run)
                    print(name, number, count, found[f"{count} steps"], flush=True)
                    write_json(output, {"results": results, "environment": describe_environment()})


def _begin(settings: DistillConfig, name: str, folder: Path) -> dict[str, float]:
    """Write the student to begin with; what its prediction lost and how long it took."""
    arguments = VARIANTS[name]
    found: dict[str, float] = {}
    if arguments is not None:
        settings = override_config(settings, ["student.init=squeeze"], "config")
    parts = build(settings, "config", build_source(settings.data))
    student = parts.model
    if arguments is not None:
        assert parts.teacher is not None
        model = parts.teacher.model
        batches = calibration_batches(
            settings, model, parts.data, parts.process, settings.student.init_images
        )
        began = time.perf_counter()
        lost, groups = squeeze_into(student, model, batches, predict, parts.origins, **arguments)
        plans = block_plans(groups, parts.origins)
        write_text(folder / PLANS_FILE, plans_to_json(plans))  # SHD goes by them
        found = {"lost": lost, "seconds": round(time.perf_counter() - began, 1)}
    student.save_pretrained(folder)
    return found


def _measure(settings: DistillConfig, start: Path, steps: int, run: Path) -> dict[str, float]:
    """FID and the validation loss's terms after so many steps."""
    validation = {"every": max(steps, 1), "num_images": 0, "loss_images": 256}
    changes = [
        f"student={{pretrained: {start}}}",
        f"train.max_steps={max(steps, 1)}",
        f"train.validation={validation}",
        # a step that moves nothing: the losses of the start are measured as all others are
        *(["train.learning_rate=1e-30"] if not steps else []),
    ]
    trained = override_config(settings, changes, "config")
    train(trained, run, "config")
    last = json.loads(RunFolder(run).metrics_file.read_text(encoding="utf-8").splitlines()[-1])
    samples = run / "samples"
    sampled = sample_pipeline(
        open_pipeline(str(run / "pipeline")), settings.sample, samples, {}, "narrow", str(run)
    )
    reference = reference_images(settings.data)
    metrics = compute_metrics(samples, reference, settings.evaluate, sampled["labels"])
    terms = {f"validation {name}": round(value, 5) for name, value in last["validation"]["terms"].items()}
    return {"fid": round(metrics["fid"], 3), **terms}


if __name__ == "__main__":
    typer.run(main)
