"""Between images in [-1, 1], as models see them, and 8-bit images, as files and metrics see them."""

from __future__ import annotations

import torch
from torch import Tensor


def to_rgb_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1], (B, C, H, W), as 8-bit RGB (B, 3, H, W); grey images get three equal channels."""
    levels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.expand(-1, 3, -1, -1) if levels.shape[1] == 1 else levels
