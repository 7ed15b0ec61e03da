"""`squeeze`: measure a teacher, and write what was found."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from shd_diffusion.analysis.measure import MeasurementPlan, measure
from shd_diffusion.analysis.plots import plot_squeezing
from shd_diffusion.attention import attention_blocks
from shd_diffusion.data import build_source
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.files import check_ours, check_outside, locked, replacing_file, write_text
from shd_diffusion.models.factory import TeacherConfig
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.teacher import load_teacher, scheduler_for
from shd_diffusion.processes import processes
from shd_diffusion.reporting.tables import csv_text, terminal
from shd_diffusion.run_folder import RunFolder

RESULTS = "squeezing.json"
BLOCK_METRICS = ("residual", "block_error", "from_mean")


def squeeze_teacher(run: RunFolder, heads: list[int], output: Path, plan: MeasurementPlan) -> dict[str, Any]:
    """Measure a run's model and write `squeezing.json`, `squeezing.csv` and `squeezing.png`.

    Args:
        heads: how many to squeeze to; the picture shows the blocks at the first.

    Returns:
        What stands in the JSON file.

    Raises:
        UserError: there is no such run, its data are missing, its heads cannot be squeezed so, or the folder is not for
            this.
    """
    check_ours(output, RESULTS)
    config = run.read_config()
    check_outside(output, config.reads)
    teacher = load_teacher(TeacherConfig(path=str(run.path)))
    model = teacher.model.to(processes().device)
    most = max((block.heads for block in attention_blocks(model).values() if block.capturable), default=0)
    for count in heads:
        if not 1 <= count <= most:
            raise UserError(f"--heads {count}: {run.path} has {most} heads; give numbers from 1 to {most}")
    source = build_source(config.trained_on)
    try:
        process = ForwardProcess.from_scheduler(scheduler_for(config.diffusion, teacher.scheduler, False))
        found = measure(model, source, process, heads, plan)
    except ValueError as error:
        raise UserError(f"{run.path}: {error}") from error
    results = {
        "teacher": run.path.name,
        "protocol": {"data": config.data.name, **asdict(plan)},
        "environment": describe_environment(),
        **_rounded(found),
    }
    # its lists are long: indented, it would be four times as large
    with locked(output):
        write_text(output / RESULTS, json.dumps(results) + "\n")
        write_text(output / "squeezing.csv", _as_csv(results))
        with replacing_file(output / "squeezing.png") as temporary:
            temporary.write_bytes(plot_squeezing(results).png)
    return results


def table(results: dict[str, Any]) -> Table:
    """Each case in a line, means over its blocks."""
    title = (
        f"{results['teacher']}: denoising error {results['denoising']:.4f}, "
        f"output error of uniform maps {results['uniform_output_error']:.4f}; squeezed:"
    )
    head = ["heads", "strategy", "residual", "block error", "KL from mean", "output error", "denoising"]
    lines = [
        [
            str(case["heads"]), case["strategy"], *(f"{mean:.4f}" for mean in _block_means(case)),
            f"{case['output_error']['mean']:.5f}", f"{case['denoising']:.4f}",
        ]
        for case in results["squeezings"]
    ]  # fmt: skip
    return terminal([head, *lines], left=2, title=title)


def _block_means(case: dict[str, Any]) -> list[float]:
    """A case's metrics, averaged over its blocks."""
    blocks = case["blocks"].values()
    return [sum(block[metric] for block in blocks) / len(blocks) for metric in BLOCK_METRICS]


def _as_csv(results: dict[str, Any]) -> str:
    """A line for each case and block."""
    return csv_text(
        {"heads": case["heads"], "strategy": case["strategy"], "block": name}
        | {metric: block[metric] for metric in BLOCK_METRICS}
        | {"output_error": case["output_error"]["mean"], "denoising": case["denoising"]}
        for case in results["squeezings"]
        for name, block in case["blocks"].items()
    )


def _rounded(content: Any) -> Any:
    """Numbers in five figures: what else there is would be noise."""
    if isinstance(content, float):
        return float(f"{content:.5g}")
    if isinstance(content, dict):
        return {key: _rounded(value) for key, value in content.items()}
    return [_rounded(value) for value in content] if isinstance(content, (list, tuple)) else content
