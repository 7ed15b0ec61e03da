"""Launch file: does DisWOT's score order students before any training as training orders them?

Students of 1 to 6 heads; their FIDs after training are those of the study in docs/results/digits-heads.

python eval/order_by_diswot.py --output docs/results/diswot-digits.json
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from scipy.stats import spearmanr

from shd_diffusion.analysis.diswot import diswot_score
from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.environment import describe_environment
from shd_diffusion.files import read_json, write_json
from shd_diffusion.models.denoiser import sample_shape
from shd_diffusion.training.build import new_model, open_model
from shd_diffusion.training.inspect_models import inspect_model, pair_rows


def main(
    output: Annotated[Path, typer.Option(help="JSON file for the results.")],
    study: Annotated[Path, typer.Option(help="What training came to.")] = Path(
        "docs/results/digits-heads/study.json"
    ),
    config: Annotated[Path, typer.Option(help="Of the distillation.")] = Path("configs/digits/distill.yaml"),
    teacher: Annotated[str, typer.Option(help="Run or pipeline folder.")] = "runs/digits/teacher",
    seeds: Annotated[int, typer.Option(min=1, help="Initial weights of each student.")] = 5,
) -> None:
    """Score each student, and compare the order."""
    model = open_model(teacher)
    shape, rows = sample_shape(model), inspect_model(model)
    assert shape is not None
    trained = [row for row in read_json(study)["rows"] if row["variant"] == "kd"]
    found = []
    for row in trained:
        heads = int(row["condition"].partition("-")[0])
        scores = []
        for seed in range(seeds):
            changes = [f"student.arguments.num_attention_heads={heads}", f"seed={seed}"]
            settings = read_config(config, DistillConfig, changes)
            student = new_model(settings, settings.student)
            scores.append(diswot_score(model, student, pair_rows(rows, inspect_model(student)), shape))
        found.append({"heads": heads, "scores": scores, "fid after training": row["metrics"]["fid"]["mean"]})
        print(heads, round(mean(scores), 4), found[-1]["fid after training"], flush=True)
    order = spearmanr(
        [-mean(each["scores"]) for each in found], [each["fid after training"] for each in found]
    )
    print(f"Spearman's correlation of a worse score with a higher FID: {order.statistic:.2f}")
    write_json(
        output,
        {"students": found, "spearman": float(order.statistic), "environment": describe_environment()},
    )


if __name__ == "__main__":
    typer.run(main)
