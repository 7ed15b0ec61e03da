"""What makes images by index, whatever they are made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from diffusers import DiffusionPipeline
from torch import Tensor


class ImageSampler(Protocol):
    """Image j follows from the seed and j.

    Attributes:
        pipeline: that makes them.
    """

    pipeline: DiffusionPipeline

    def images(self, indices: Sequence[int]) -> Tensor:
        """The images of these indices, uint8 (B, 3, H, W).

        Raises:
            ValueError: they are not finite.
        """

    def told(self, count: int) -> dict[str, Any]:
        """What the first so many images are made from, by its name in `Summary`; empty where by nothing."""

    def lines(self, count: int) -> list[dict[str, Any]]:
        """What `metadata.jsonl` says of the first so many images, one by one; empty where it says nothing."""

    def settings(self) -> dict[str, Any]:
        """What all images depend on, for their protocol."""
