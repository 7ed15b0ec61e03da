"""The latents that a pipeline's call ends with, as its denoiser sees them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def last_step(scheduler: Any) -> Iterator[list[Tensor]]:
    """Keep what a scheduler's last step gives: the latents that a pipeline returns by `output_type="latent"`.

    So one sampling gives latents and images, and latents are those of the denoiser whatever a pipeline makes of them.
    """
    step = scheduler.step
    kept: list[Tensor] = []

    @functools.wraps(step)  # pipelines look at its arguments
    def keeping(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        kept[:] = [result[0]]
        return result

    scheduler.step = keeping
    try:
        yield kept
    finally:
        del scheduler.step
