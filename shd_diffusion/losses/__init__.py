"""What a student is trained on: denoising, output KD, SHD."""

from shd_diffusion.losses.blocks import map_blocks
from shd_diffusion.losses.explanation import Explanation
from shd_diffusion.losses.schedule import schedule_weight
from shd_diffusion.losses.shd import NonFiniteError, SHDLoss

__all__ = ["Explanation", "NonFiniteError", "SHDLoss", "map_blocks", "schedule_weight"]
