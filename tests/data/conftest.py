"""A folder of images, the same with a broken one, and a tiny VAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_files import SIZE, write_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", broken=False)


@pytest.fixture
def broken_images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", broken=True)


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a randomly initialised VAE that halves each side."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder
