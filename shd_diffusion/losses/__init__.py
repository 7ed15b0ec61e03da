"""What a student is trained on: denoising, output KD, SHD."""

from shd_diffusion.losses.shd import SHDLoss

__all__ = ["SHDLoss"]
