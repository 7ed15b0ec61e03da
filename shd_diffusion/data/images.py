"""Between images in [-1, 1], as models see them, and 8-bit images, as files and metrics see them."""

from __future__ import annotations

import torch
from torch import Tensor


def from_bytes(levels: Tensor) -> Tensor:
    """8-bit images of any shape in [-1, 1], float32."""
    return levels.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] of any shape as 8-bit ones, rounded; what lies outside is clamped."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_rgb(images: Tensor) -> Tensor:
    """Images (..., C, H, W); grey ones get three equal channels."""
    return images.expand(*images.shape[:-3], 3, -1, -1) if images.shape[-3] == 1 else images


def to_rgb_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1], (B, C, H, W), as 8-bit RGB (B, 3, H, W); grey images get three equal channels."""
    return to_rgb(to_bytes(images))
