"""Launch file: does it pay to train the blocks of a squeezed model apart from each other before it is healed?

Each block of the student is fed what the teacher's block was, and learns what that put out: the first stage of Grafting
(arXiv 2506.05340), and StableKD's isolated blocks (arXiv 2312.13223) where student and teacher are equally wide.

python eval/local_regression.py runs/studies/digits-healing/compressed/merged \
    --output docs/results/local-regression-digits.json
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from diffusers import ModelMixin
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn

from shd_diffusion.compression.depth import block_list
from shd_diffusion.config import DistillConfig, override_config, read_config
from shd_diffusion.data.datasets import build_source, reference_images
from shd_diffusion.environment import describe_environment
from shd_diffusion.evaluation.evaluate import compute_metrics
from shd_diffusion.files import read_json, write_json
from shd_diffusion.models.denoiser import predict
from shd_diffusion.sampling.open_pipeline import open_pipeline
from shd_diffusion.sampling.sample_run import sample_pipeline
from shd_diffusion.statistics import estimate, paired
from shd_diffusion.training.build import build
from shd_diffusion.training.calibration import calibration_batches
from shd_diffusion.training.run import train

# Steps of local regression, and of output KD behind it
SCHEDULES = {
    "KD 150": (0, 150),
    "local 75, KD 75": (75, 75),
    "KD 300": (0, 300),
    "local 150, KD 150": (150, 150),
}

Taught = tuple[tuple[Any, ...], Mapping[str, Any], Tensor]


def main(
    student: Annotated[str, typer.Argument(help="Pipeline folder, as `compress` leaves it.")],
    output: Annotated[Path, typer.Option(help="JSON file for the results; those in it stay.")],
    config: Annotated[Path, typer.Option(help="Of the healing.")] = Path("configs/digits/heal.yaml"),
    seed: Annotated[list[int] | None, typer.Option(help="Of data, noise and samples.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="As for `distill`.")] = None,
) -> None:
    """Train, sample and evaluate by every schedule."""
    seeds = seed or list(range(5))
    results: dict[str, Any] = read_json(output)["results"] if output.exists() else {}
    for number in seeds:
        for name, (local, together) in SCHEDULES.items():
            key = f"{name}, seed {number}"
            if key in results:
                continue
            changes = [
                f"student.pretrained={student}",
                f"seed={number}",
                f"sample.seed={number}",
                *(set_ or []),
            ]
            with TemporaryDirectory() as folder:
                settings = read_config(config, DistillConfig, changes)
                errors: dict[str, float] = {}
                if local:
                    errors = _regress_blocks(settings, local, Path(folder) / "student")
                    changes = [f"student.pretrained={Path(folder) / 'student'}"]
                    settings = override_config(settings, changes, "config")
                settings = override_config(settings, [f"train.max_steps={together}"], "config")
                results[key] = errors | {"fid": _heal(settings, Path(folder) / "run")}
            print(key, results[key], flush=True)
            write_json(output, {"results": results, "environment": describe_environment()})
    fids = {name: [results[f"{name}, seed {n}"]["fid"] for n in seeds] for name in SCHEDULES}
    summary = {
        "fid": {name: asdict(estimate(each)) for name, each in fids.items()},
        "minus": {
            f"{name} - {other}": asdict(paired(fids[name], fids[other]))
            for name, other in combinations(SCHEDULES, 2)
        },
    }
    write_json(output, {**read_json(output), "summary": summary})


def _regress_blocks(settings: DistillConfig, steps: int, folder: Path) -> dict[str, float]:
    """Train every block apart, by the optimiser of the config; write the student, and tell its first and last error."""
    parts = build(settings, "config", build_source(settings.data))
    assert parts.teacher is not None
    teacher, model, rate = parts.teacher.model, parts.model, settings.train
    images = steps * rate.batch_size
    batches = calibration_batches(settings, teacher, parts.data, parts.process, images, rate.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate.learning_rate, weight_decay=rate.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, rate.warmup_steps, steps)
    _, blocks = block_list(model)
    losses = []
    for batch in batches:
        errors = []
        for block, (args, kwargs, target) in zip(blocks, _taught(teacher, batch), strict=True):
            error = (block(*args, **kwargs) - target).square().sum()
            errors.append(error / target.square().sum())
        loss = torch.stack(errors).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), rate.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.save_pretrained(folder)
    return {"error of the blocks before": losses[0], "after": losses[-1]}


@torch.no_grad()
def _taught(teacher: ModelMixin, batch: Any) -> list[Taught]:
    """What each of the teacher's blocks, in order, was called with and put out."""
    found: list[Taught] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        found.append((args, kwargs, out))

    hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in block_list(teacher)[1]]
    predict(teacher, *batch)
    for hook in hooks:
        hook.remove()
    return found


def _heal(settings: DistillConfig, run: Path) -> float:
    """FID of what the distillation of the config comes to."""
    train(settings, run, "config")
    pipeline, samples = open_pipeline(str(run / "pipeline")), run / "samples"
    sampled = sample_pipeline(pipeline, settings.sample, samples, {}, "local", str(run))
    reference = reference_images(settings.data)
    return float(compute_metrics(samples, reference, settings.evaluate, sampled["labels"])["fid"])


if __name__ == "__main__":
    typer.run(main)
