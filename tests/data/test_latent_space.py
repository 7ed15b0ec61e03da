"""The latent space against the arithmetic of diffusers' pipelines, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderTiny,
    ModelMixin,
)
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE
from torch import Tensor

from shd_diffusion.data.latent_space import LatentSpace, sample_latents
from shd_diffusion.models.families import family_of, unpack
from shd_diffusion.models.prompts import denoiser_name

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # float32: a shift, a scale and the two rounded once more


def kl(**changes: Any) -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, **changes)


def dc() -> AutoencoderDC:
    blocks = {
        "block_types": ("ResBlock", "ResBlock"),
        "block_out_channels": (8, 8),
        "layers_per_block": (1, 1),
    }
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    qkv = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    return AutoencoderDC(latent_channels=4, scaling_factor=0.41, **sides, **qkv)


def flux2() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 4)
    return vae.eval()


def qwen() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[0.5, 1.5, 2.0, 3.0],
    ).eval()


def decode_kl(vae: ModelMixin, latents: Tensor) -> Tensor:  # StableDiffusion3Pipeline, FluxPipeline
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]


def decode_xl(vae: ModelMixin, latents: Tensor) -> Tensor:  # StableDiffusionXLPipeline
    mean, std = (
        torch.tensor(statistics).view(1, 4, 1, 1)
        for statistics in (vae.config.latents_mean, vae.config.latents_std)
    )
    return vae.decode(latents * std / vae.config.scaling_factor + mean, return_dict=False)[0]


def decode_dc(vae: ModelMixin, latents: Tensor) -> Tensor:  # SanaPipeline
    return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]


def decode_flux2(vae: ModelMixin, latents: Tensor) -> Tensor:  # Flux2Pipeline
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return vae.decode(Flux2Pipeline._unpatchify_latents(latents * std + mean), return_dict=False)[0]


def decode_qwen(vae: ModelMixin, latents: Tensor) -> Tensor:  # QwenImagePipeline
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return vae.decode(latents / std + mean, return_dict=False)[0][:, :, 0]


CASES = {
    "kl": (lambda: kl(scaling_factor=0.36, shift_factor=0.11), decode_kl),
    "kl by channel": (
        lambda: kl(latents_mean=(0.1, -1.0, 2.0, 0.3), latents_std=(0.5, 1.0, 2.0, 3.0), scaling_factor=0.5),
        decode_xl,
    ),
    "dc": (dc, decode_dc),
    "flux2": (flux2, decode_flux2),
    "qwen": (qwen, decode_qwen),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_latents_are_decoded_as_by_the_pipelines(case: str):
    torch.manual_seed(0)
    make, decode = CASES[case]
    vae = make()
    space = LatentSpace(vae)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    parts = space.parts(images)
    moments = space.encode(images)
    assert moments.shape[1] == len(parts) * parts[0].shape[1]
    latents = space.normalise(sample_latents(moments, torch.zeros_like(parts[0])))
    torch.testing.assert_close(space.denormalise(latents), parts[0], **TOLERANCE)
    assert space.decode(latents).shape == images.shape
    torch.testing.assert_close(space.decode(latents), decode(vae, latents), **TOLERANCE)


@torch.no_grad()
def test_flux2_is_encoded_as_by_its_pipeline():
    torch.manual_seed(0)
    vae, images = flux2(), torch.rand(2, 3, 16, 24) * 2 - 1
    space = LatentSpace(vae)
    latents = Flux2Pipeline._patchify_latents(vae.encode(images).latent_dist.mode())
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    expected = (latents - vae.bn.running_mean.view(1, -1, 1, 1)) / std
    found = space.normalise(space.parts(images)[0])
    assert found.shape == (2, 16, 8, 12)
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", PIPELINES)
@torch.no_grad()
def test_every_pipeline_decodes_its_latents_so(name: str):
    pipeline = PIPELINES[name]()
    call = {
        "prompt": "a cat",
        "height": SIZE[0],
        "width": SIZE[1],
        "num_inference_steps": 2,
        **ARGUMENTS.get(name, {}),
    }

    def made(output_type: str) -> Tensor:
        return torch.as_tensor(pipeline(generator=torch.manual_seed(0), output_type=output_type, **call)[0])

    latents, images = made("latent"), made("pt")
    if latents.ndim == 3:
        patch = family_of(getattr(pipeline, denoiser_name(pipeline))).patch
        latents = unpack(latents, torch.Size((8, 8)), patch)
    decoded = (LatentSpace(pipeline.vae).decode(latents) / 2 + 0.5).clamp(0, 1)
    decoded = decoded.transpose(1, 2) if decoded.ndim == 5 else decoded
    torch.testing.assert_close(decoded, images, **TOLERANCE)
    assert images.std() > 0.01


@torch.no_grad()
def test_a_sample_is_that_of_the_distribution():
    torch.manual_seed(0)
    vae, images = kl(), torch.rand(2, 3, 16, 16) * 2 - 1
    distribution = vae.encode(images).latent_dist
    noise = torch.randn(distribution.mean.shape, generator=torch.Generator().manual_seed(3))
    expected = distribution.sample(torch.Generator().manual_seed(3))
    space = LatentSpace(vae)
    torch.testing.assert_close(sample_latents(space.encode(images), noise), expected, **TOLERANCE)


@torch.no_grad()
def test_videos_keep_their_frames():
    torch.manual_seed(0)
    space = LatentSpace(qwen())
    videos = torch.rand(1, 3, 5, 16, 16)
    latents = space.normalise(space.parts(videos)[0])
    assert latents.ndim == 5 and latents.shape[:2] == (1, 4)
    assert space.decode(latents).shape == videos.shape


def test_a_vae_of_latents_alone_needs_no_noise():
    space = LatentSpace(
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )
    )
    moments = space.encode(torch.zeros(1, 3, 16, 16))
    assert moments.shape == (1, 4, 8, 8) and torch.equal(
        sample_latents(moments, torch.ones_like(moments)), moments
    )
