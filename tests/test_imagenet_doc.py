"""The costs in docs/imagenet.md are those of the dry runs' result files."""

from __future__ import annotations

import json

import pytest
import torch
from commands import ROOT
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

A100 = 0.4 * 312e12  # operations a second, in bf16
SAMPLING = [0.4 * 19.5e12, 0.4 * 156e12, A100]  # in float32, TF32 and bf16
DOC = (ROOT / "docs" / "imagenet.md").read_text(encoding="utf-8")
RUNS = ("mdtv2-b-teacher", "mdtv2-b-to-s", "mdtv2-xl-to-s", "dit-xl-to-s")


def rows(name: str) -> list[list[str]]:
    """The cells of every table row that begins with the run's name."""
    lines = [line for line in DOC.splitlines() if line.startswith(f"| {name} |")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("name", RUNS)
def test_costs_follow_from_the_dry_run(name: str) -> None:
    figures = json.loads((ROOT / "docs" / "results" / f"dry-run-{name}.json").read_text())
    costs, memory = rows(name)
    operations, size = figures["operations_per_image"], figures["memory_bytes"]
    total = 400_000 * 256 * operations["training"]
    sampling = 50_000 * 250 * 2 * operations["forward"]
    taught = operations.get("teacher_forward")
    assert costs[1:] == [
        "" if taught is None else f"{taught / 1e9:.1f} G",
        f"{operations['forward'] / 1e9:.1f} G",
        f"{operations['training'] / 1e9:.1f} G",
        f"{total:.2e}".replace("e+", "e"),
        f"{total / A100 / 3600:.0f}",
        *(f"{sampling / speed / 3600:.1f}" for speed in SAMPLING),
    ]
    states = sum(size[part] for part in ("weights", "gradients", "optimiser", "average"))
    assert memory[1:] == [
        f"{states / 1e9:.2f}",
        f"{size['teacher'] / 1e9:.2f}" if size["teacher"] else "",
        f"{size['activations'] / 1e9:.2f}",
        f"{size['sum'] / 1e9:.2f}",
        f"{figures['measured']['peak_bytes'] / 1e9:.1f}",
    ]
    assert figures["measured"]["peak_bytes"] < 20e9  # the machine that this must fit on


def test_the_vae_takes_the_operations_that_the_page_tells() -> None:
    stages = 4
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * stages,
            up_block_types=["UpDecoderBlock2D"] * stages,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            sample_size=256,
        )
        counted = []
        for side, x in ((vae.encode, torch.zeros(1, 3, 256, 256)), (vae.decode, torch.zeros(1, 4, 32, 32))):
            with FlopCounterMode(display=False) as counter:
                side(x)
            counted.append(counter.get_total_flops())
    assert f"Encoding takes {counted[0] / 1e9:.0f} G operations an" in DOC
    assert f"{1_281_167 * 2 * counted[0]:.1e}".replace("e+", "e") in DOC
    assert (
        f"takes {counted[1] / 1e9:.0f} G operations each, {50_000 * counted[1]:.1e}: ".replace("e+", "e")
        in DOC
    )
