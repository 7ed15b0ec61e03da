"""Multiply-adds against torch's own counter and by hand; calls of an image against its schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_runs import random_dit_pipeline
from small_models import small_dit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shd_diffusion.benchmark.candidates import calls_by_class
from shd_diffusion.benchmark.count import count, weight_bytes
from shd_diffusion.config import SampleConfig
from shd_diffusion.sampling.by_class import ByClass


def macs_by_hand(tokens: int, width: int, layers: int, patch: int, channels: int) -> int:
    """A DiT of diffusers: patches in, embeddings of time and class, blocks, patches out."""
    patches = tokens * width * patch * patch * channels
    time = 256 * width + width * width  # one embedding of timesteps a block, and one for the last layer
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    block = attention + 2 * tokens * width * 4 * width + time + width * 6 * width
    out = time + width * 2 * width + tokens * width * patch * patch * channels
    return patches + layers * block + out


@pytest.mark.parametrize("samples", [1, 3])
def test_multiply_adds_are_torchs_count_and_that_by_hand(samples: int) -> None:
    model = small_dit(2, layers=3).eval()
    run = calls_by_class(model, (1, 8, 8))(samples)
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as flops,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        run()
    found = count(run, model, [model])
    assert found.macs == flops.get_total_flops() // 2 == samples * macs_by_hand(16, 16, 3, 2, 1)
    assert found.samples == samples


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({}, 4),
        ({"guidance_scale": 2.0}, 8),
        ({"guidance_scale": 2.0, "guidance_interval": [0, 20]}, 4 + 2),  # of steps at 36, 24, 12 and 0
    ],
)
def test_an_image_takes_its_steps_and_those_with_guidance_twice(settings: dict[str, Any], calls: int) -> None:
    pipeline = random_dit_pipeline()
    sampler = ByClass(pipeline, SampleConfig(num_inference_steps=4, **settings))
    call = count(calls_by_class(pipeline.denoiser, (1, 8, 8))(1), pipeline.denoiser, [pipeline.denoiser])
    image = count(lambda: sampler.images(range(2)), pipeline.denoiser, [pipeline.denoiser])
    assert image.samples == 2 * calls and image.macs == image.samples * call.macs


def test_memory_is_that_of_weights_and_of_what_is_held() -> None:
    model = nn.Linear(8, 8, bias=False)
    model.register_buffer("table", torch.zeros(5, dtype=torch.int64))
    given = torch.zeros(100, 8)

    def run() -> None:
        first = model(given)  # 3,200 bytes
        second = first + 1  # beside it 3,200 more
        del first
        second.mul_(2)

    assert weight_bytes([model]) == 8 * 8 * 4 + 5 * 8
    assert count(run, model, [model]).peak_bytes == 6400  # type: ignore[arg-type]
