"""Latents that a teacher samples from prompts."""

from __future__ import annotations

import pytest
import torch
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE

from shd_diffusion.data.latent_space import LatentSpace
from shd_diffusion.data.sampled_latents import LatentSampler, TeacherSamplingConfig


@pytest.mark.parametrize("name", ["cogview4", "sd3", "qwen-image"])
def test_a_latent_does_not_depend_on_the_prompts_beside_it(name: str) -> None:
    pipeline = PIPELINES[name]()
    space, config = LatentSpace(pipeline.vae), TeacherSamplingConfig(num_inference_steps=2)
    shape = (pipeline.vae.config.latent_channels if name == "sd3" else 4, SIZE[0] // 8, SIZE[1] // 8)
    sampler = LatentSampler(pipeline, space, SIZE, shape, config, ARGUMENTS.get(name, {}))
    alone, beside = (
        sampler.sample([0], ["a cat"]),
        sampler.sample([0, 1], ["a cat", "a red fox jumps over it"]),
    )
    assert beside.shape[0] == 2
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-4, atol=1e-4)
