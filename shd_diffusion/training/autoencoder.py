"""A small autoencoder trained from scratch, for images that no published one fits: an AutoencoderTiny of diffusers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from pydantic import Field
from torch import Tensor, nn

from shd_diffusion.data.image_sets import Images
from shd_diffusion.data.images import from_bytes, to_rgb
from shd_diffusion.progress import progress_bar
from shd_diffusion.randomness import generator
from shd_diffusion.section import Section

DOWNSAMPLING = 4
NOISE = 0.05  # added to latents in training, of about unit scale, so that what is near a latent decodes as it does
CENTRING = 0.01  # weight of the penalty on the channels' means: pipelines scale latents, few of them shift


class AutoencoderConfig(Section):
    """An autoencoder with latents of a quarter of the image's side, and how it is trained on square crops."""

    latent_channels: int = Field(8, ge=1)
    width: int = Field(32, ge=1)
    max_steps: int = Field(..., ge=1)
    batch_size: int = Field(16, ge=1)
    crop_size: int = Field(32, ge=DOWNSAMPLING, multiple_of=DOWNSAMPLING)
    learning_rate: float = Field(2e-3, gt=0, le=1e6, allow_inf_nan=False)
    warmup_steps: int = Field(30, ge=0)


def train_autoencoder(images: Images, config: AutoencoderConfig, seed: int) -> AutoencoderTiny:
    """An autoencoder of images, on the mean squared error of their reconstruction; it follows from the seed.

    Its `scaling_factor` brings the latents of these images to a mean square of one.

    Raises:
        ValueError: the images are smaller than the crops, or do not divide into latents.
    """
    height, width = images.shape[1:]
    if config.crop_size > min(height, width):
        raise ValueError(f"`crop_size` {config.crop_size} is larger than the images ({height}×{width} px)")
    if height % DOWNSAMPLING or width % DOWNSAMPLING:
        raise ValueError(f"images of {height}×{width} px do not divide into latents of a {DOWNSAMPLING}th")
    pixels = to_rgb(torch.stack([images.image(index) for index in range(len(images))]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(config.width,) * 3,
            decoder_block_out_channels=(config.width,) * 3,
            num_encoder_blocks=(0, 1, 2),  # full resolution is where the time goes
            num_decoder_blocks=(3, 1, 0),
            latent_channels=config.latent_channels,
        )
        for layer in (*vae.encoder.layers, *vae.decoder.layers):
            if isinstance(layer, nn.Conv2d):  # by torch's own initialisation each would shrink its input
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    vae.to(memory_format=torch.channels_last)
    _train(vae, pixels, config, seed)
    with torch.no_grad():
        latents = torch.cat([vae.encode(from_bytes(part)).latents for part in pixels[:1024].split(64)])
    vae.register_to_config(scaling_factor=1 / float(latents.square().mean().sqrt()))
    return vae.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def _train(vae: AutoencoderTiny, pixels: Tensor, config: AutoencoderConfig, seed: int) -> None:
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=config.warmup_steps),
            torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, max(1, config.max_steps - config.warmup_steps)
            ),
        ],
        milestones=[config.warmup_steps],
    )
    with progress_bar(config.max_steps, "autoencoder", "step") as bar:
        for step in range(config.max_steps):
            draw = generator(seed, "autoencoder", step)
            target = _crops(pixels, config.batch_size, config.crop_size, draw)
            latents = vae.encode(target).latents
            noise = torch.randn(latents.shape, generator=draw)
            error = F.mse_loss(vae.decode(latents + NOISE * noise).sample, target)
            loss = error + CENTRING * latents.mean(dim=(0, 2, 3)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"error {float(error.detach()):.4f}", refresh=False)
            bar.update()


def _crops(pixels: Tensor, count: int, size: int, draw: torch.Generator) -> Tensor:
    """Images drawn at random, cropped at one place, in [-1, 1]."""
    chosen = torch.randint(len(pixels), (count,), generator=draw)
    top, left = (
        int(torch.randint(side - size + 1, (), generator=draw)) for side in (pixels.shape[2], pixels.shape[3])
    )
    crops = from_bytes(pixels[chosen, :, top : top + size, left : left + size])
    return crops.contiguous(memory_format=torch.channels_last)
