"""The numbers in docs/text-to-image.md are those of the dry runs' result files."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest
from commands import ROOT

from shd_diffusion.config import DistillConfig, read_config

A100 = 0.4 * 312e12  # operations a second, in bf16
NAMES = ("sd15", "sdxl", "pixart-sigma", "sd35-medium", "flux-dev")


def result(name: str) -> dict[str, Any]:
    text = (ROOT / "docs" / "results" / f"dry-run-{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def cells(found: dict[str, Any]) -> dict[str, list[str]]:
    """The cells of each table's row after the name."""
    config = read_config(ROOT / found["config"], DistillConfig)
    forward, taught, training = (
        found["operations_per_image"][key] for key in ("forward", "teacher_forward", "training")
    )
    latents = 2 * 2 * prod(found["sample"])  # mean and log-variance, float16
    prompt = sum(2 * prod(shape) for name, shape in found["condition"].items() if "mask" not in name)
    sampling = config.sample.num_images * config.sample.num_inference_steps * forward
    sampling *= 1 if "guidance" in found["condition"] else 2
    size = found["memory_bytes"]
    states = sum(size[part] for part in ("weights", "gradients", "optimiser", "average"))
    processes = config.train.num_processes if config.train.shard else 1
    options = found["memory_bytes_by_option"]
    return {
        "disk": [f"{latents / 1e6:.2f}", f"{prompt / 1e6:.2f}", f"{(latents + prompt) / 1e6:.2f}"],
        "costs": [
            f"{found['teacher']['parameters'] / 1e6:,.0f} M",
            f"{found['student']['parameters'] / 1e6:,.0f} M",
            f"{taught / 1e12:.2f} T",
            f"{forward / 1e12:.2f} T",
            f"{training / 1e12:.2f} T",
            f"{found['run']['operations'] / A100 / 3600:,.0f}",
            f"{sampling / A100 / 3600:.2f}",
        ],
        "memory": [
            str(found["images_per_pass"]),
            f"{size['teacher'] * processes / 1e9:.1f}",
            f"{states * processes / 1e9:.1f}",
            *(f"{options[option] / 1e9:.1f}" for option in options),
        ],
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_document_tells_what_the_dry_runs_found(name: str) -> None:
    lines = (ROOT / "docs" / "text-to-image.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith(f"| {name} |")]
    assert [[cell.strip() for cell in row.strip("|").split("|")][1:] for row in rows] == list(
        cells(result(name)).values()
    )


def test_the_document_tells_what_the_two_steps_took() -> None:
    text = (ROOT / "docs" / "results" / "benchmark-text-step.json").read_text(encoding="utf-8")
    figures = json.loads(text)["figures"]
    document = (ROOT / "docs" / "text-to-image.md").read_text(encoding="utf-8")
    assert figures["parameters"] == {
        part: result("pixart-sigma")[part]["parameters"] for part in ("teacher", "student")
    }
    assert len(figures["steps"]) == 2
    assert all(f"| {name} | {taken} |" in document for name, taken in figures["steps"][1]["seconds"].items())
    assert f"at most {figures['gigabytes at most']} GB" in document
    assert f"--image-size {8 * figures['sample'][1]} " in document
