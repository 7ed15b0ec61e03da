"""Attention maps as pictures."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap

from shd_diffusion.reporting.pictures import Pixels
from shd_diffusion.reporting.runs import Array

COLOURS = LinearSegmentedColormap.from_list(
    "maps", ["#ffffff", "#d5e0f5", "#8fb0e8", "#4a6fc9", "#2c3a94", "#150f45"]
)
"""From nothing (white) to much (indigo); the page inverts it in the dark."""


def map_pixels(values: Array, brightest: float) -> Pixels:
    """A map (Q, K) as RGB pixels, `brightest` and more being darkest."""
    return np.asarray(COLOURS(np.clip(values / brightest, 0, 1), bytes=True)[..., :3])
