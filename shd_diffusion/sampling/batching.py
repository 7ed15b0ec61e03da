"""Which images go through the model together: by index, whoever computes them."""

from __future__ import annotations

import math

from shd_diffusion.config import SampleConfig


def deal_passes(config: SampleConfig, process: int = 0, num_processes: int = 1) -> list[range]:
    """The passes of one of several processes, each as the indices of its images.

    The rounding of a matrix product depends on its shape. So every pass is of exactly `config.pass_size` images,
    the last one too, with indices from `config.num_images` on that nobody keeps: image j always has place
    j mod pass_size among as many others. The processes take turns of `config.batch_size` images, rounded up to
    whole passes.
    """
    size = config.pass_size
    turn = math.ceil(config.batch_size / size) * size
    return [
        range(first, first + size)
        for start in range(process * turn, config.num_images, num_processes * turn)
        for first in range(start, min(start + turn, config.num_images), size)
    ]
