"""Launch file: compress a trained digits teacher in place, sample from what comes out, and evaluate it.

python eval/compress_digits.py runs/digits/teacher --output docs/results/compress-digits.json
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from shd_diffusion.compression import compress
from shd_diffusion.compression.attention import HeadOptions
from shd_diffusion.compression.compress import Batch
from shd_diffusion.config import TrainTeacherConfig, read_run_config
from shd_diffusion.data import build_source, reference_images
from shd_diffusion.environment import describe_environment
from shd_diffusion.evaluation.evaluate import evaluate_run
from shd_diffusion.files import write_json
from shd_diffusion.losses.denoising import forward_process
from shd_diffusion.models.adapter import count_parameters, null_label, predict
from shd_diffusion.randomness import generator
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline
from shd_diffusion.sampling.stage import sample_pipeline

# Arguments of `compress`.
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
}


def calibration(config: TrainTeacherConfig, count: int, batch: int, seed: int, null: int) -> list[Batch]:
    """Noised training images with their labels, some dropped, as the teacher was trained on."""
    source, process = build_source(config.data), forward_process(config.diffusion)
    draw = generator(seed, "compress", 0)
    clean, labels = source.first(len(source))
    chosen = torch.randint(len(source), (count,), generator=draw)
    clean, labels = clean[chosen], labels[chosen]
    noise = torch.randn(clean.shape, generator=draw)
    timesteps = torch.randint(process.num_timesteps, (count,), generator=draw)
    dropped = torch.rand(count, generator=draw) < config.train.label_drop
    labels = torch.where(dropped, null, labels)
    noised, times = process.noised(clean, noise, timesteps), process.times(timesteps)
    return list(zip(noised.split(batch), times.split(batch), labels.split(batch), strict=True))


def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run of `train-teacher`.")],
    output: Annotated[Path, typer.Option(help="JSON file for the results; its cases are kept.")],
    case: Annotated[list[str] | None, typer.Option(help="Some of the cases.")] = None,
    images: Annotated[int, typer.Option(help="Calibration images.")] = 1024,
    batch: Annotated[int, typer.Option(help="Images of a forward pass.")] = 128,
    seed: int = 0,
    pairing: str = "matched",
    queries: str = "select",
) -> None:
    """Compress, sample and evaluate each case."""
    config = read_run_config(run / "config.yaml")
    assert isinstance(config, TrainTeacherConfig)
    results: dict[str, Any] = {}
    for name in case or list(CASES):
        pipeline = ClassConditionalPipeline.from_pretrained(RunFolder(run).pipeline)
        teacher = pipeline.denoiser
        batches = calibration(config, images, batch, seed, null_label(teacher))
        began = time.perf_counter()
        options = HeadOptions(pairing=pairing, queries=queries)  # type: ignore[arg-type]
        found = compress(teacher, batches, predict, options=options, **CASES[name])
        seconds = time.perf_counter() - began
        pipeline.register_modules(denoiser=found.model)
        with TemporaryDirectory() as folder:
            images_folder = Path(folder) / "samples"
            sampled = sample_pipeline(pipeline, config.sample, images_folder, {}, name, str(run))
            metrics = evaluate_run(
                images_folder, reference_images(config.data), config.evaluate, sampled["labels"]
            )
        results[name] = {
            "fid": metrics["fid"],
            "lost": found.lost,
            "parameters": count_parameters(found.model),
            "seconds": round(seconds, 1),
            "parts": [
                [p.name, p.before, p.after, round(p.lost_before, 4), round(p.lost, 4)] for p in found.parts
            ],
        }
        print(name, results[name]["fid"], found.lost, results[name]["seconds"], flush=True)
        write_json(output, {"cases": results, "environment": describe_environment()})


if __name__ == "__main__":
    typer.run(main)
