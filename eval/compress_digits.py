"""Launch file: compress a trained digits teacher in place, sample from what comes out, and evaluate it.

python eval/compress_digits.py runs/digits/teacher/pipeline --output docs/results/compress-digits.json
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from shd_diffusion.compression import compress
from shd_diffusion.compression.attention import HeadOptions
from shd_diffusion.compression.budget import parse_budget, plan_shape
from shd_diffusion.compression.costs import cost_of
from shd_diffusion.compression.walk import first_sample
from shd_diffusion.config import TrainTeacherConfig, read_config
from shd_diffusion.data.datasets import build_source, reference_images
from shd_diffusion.environment import describe_environment
from shd_diffusion.evaluation.evaluate import compute_metrics
from shd_diffusion.files import write_json
from shd_diffusion.models.denoiser import count_parameters, predict
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.sampling.open_pipeline import open_pipeline
from shd_diffusion.sampling.sample_run import sample_pipeline
from shd_diffusion.training.calibration import calibration_batches

# Arguments of `compress`, or a budget that finds them.
CASES: dict[str, dict[str, Any]] = {
    "teacher": {},
    "6 heads": {"heads": 6},
    "half of the neurons": {"neurons": 0.5},
    "6 heads, half of the neurons": {"heads": 6, "neurons": 0.5},
    "4 heads": {"heads": 4},
    "3 heads": {"heads": 3},
    "2 heads": {"heads": 2},
    "1 head": {"heads": 1},
    "a quarter of the neurons": {"neurons": 0.25},
    "4 heads, a quarter of the neurons": {"heads": 4, "neurons": 0.25},
    "6 wider heads, plain": {"heads": 6, "plain": True},
    "5 blocks": {"blocks": 5},
    "4 blocks": {"blocks": 4},
    # of the multiply-adds what loses least, beside a uniform shape of as many
    "macs=0.75": {"budget": "macs=0.75"},
    "9 heads, 279 neurons": {"heads": 9, "neurons": 279},
    "macs=0.5": {"budget": "macs=0.5"},
    "6 heads, 175 neurons": {"heads": 6, "neurons": 175},
}


def main(
    teacher: Annotated[
        str, typer.Argument(metavar="PIPELINE", help="The pipeline folder of a trained teacher.")
    ],
    output: Annotated[Path, typer.Option(help="JSON file for the results.")],
    config: Annotated[Path, typer.Option(help="Its config.")] = Path("configs/digits/teacher.yaml"),
    case: Annotated[list[str] | None, typer.Option(help="Some of the cases.")] = None,
    images: Annotated[int, typer.Option(help="Calibration images.")] = 1024,
    batch: Annotated[int, typer.Option(help="Images of a forward pass.")] = 128,
    pairing: str = "matched",
    queries: str = "select",
) -> None:
    """Compress, sample and evaluate each case."""
    settings = read_config(config, TrainTeacherConfig)
    options = HeadOptions(pairing=pairing, queries=queries)  # type: ignore[arg-type]
    source, reference = build_source(settings.data), reference_images(settings.data)
    results: dict[str, Any] = {}
    for name in case or list(CASES):
        pipeline = open_pipeline(teacher)
        model = pipeline.denoiser
        process = ForwardProcess.from_scheduler(pipeline.scheduler)
        batches = calibration_batches(settings, model, source, process, images, batch)
        total = cost_of(model, "macs", partial(predict, model, *first_sample(batches)))
        began = time.perf_counter()
        arguments = dict(CASES[name])
        if "budget" in arguments:
            budget = parse_budget(arguments.pop("budget"))
            arguments = plan_shape(model, batches, predict, budget, first_sample(batches), options).arguments
        found = compress(model, batches, predict, options=options, **arguments)
        seconds = time.perf_counter() - began
        own = partial(predict, found.model, *first_sample(batches))
        pipeline.register_modules(denoiser=found.model)
        with TemporaryDirectory() as folder:
            samples = Path(folder) / "samples"
            sampled = sample_pipeline(pipeline, settings.sample, samples, {}, name, teacher)
            metrics = compute_metrics(samples, reference, settings.evaluate, sampled["labels"])
        results[name] = {
            "fid": metrics["fid"],
            "lost": found.lost,
            "parameters": count_parameters(found.model),
            "multiply_adds": round(cost_of(found.model, "macs", own) / total, 4),
            "seconds": round(seconds, 1),
            "parts": [
                [p.name, p.before, p.after, round(p.lost_before, 4), round(p.lost, 4)] for p in found.parts
            ],
        }
        print(name, results[name]["fid"], found.lost, results[name]["seconds"], flush=True)
        write_json(output, {"cases": results, "environment": describe_environment()})


if __name__ == "__main__":
    typer.run(main)
