"""DiT as its authors trained it."""

from __future__ import annotations

import functools
from typing import Any

from diffusers import DiTTransformer2DModel, ModelMixin  # noqa: F401 -- pipelines look for the latter here


class OriginalDiTTransformer2DModel(DiTTransformer2DModel):
    """diffusers' DiT with the timestep frequencies of facebookresearch/DiT.

    The authors embed timesteps with frequencies 10000^(-i/128), diffusers with 10000^(-i/127): at t = 999 the
    angles are up to 2.9 radians apart, so that the same weights compute different functions. All else is the
    same, names and config too: either class reads the folders of the other.
    """

    @functools.wraps(DiTTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
