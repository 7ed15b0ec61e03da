"""LPIPS (Zhang et al. 2018, arXiv 1801.03924) by torchmetrics, which has all of it but AlexNet's weights."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights

from shd_diffusion.files import sha256

NET, URL = "alex", AlexNet_Weights.IMAGENET1K_V1.url
SMALLEST = 32  # pixels of a side; of less AlexNet's last layers leave nothing


def weights_file() -> Path:
    """Where torchvision keeps the weights of the network that LPIPS stands on."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name


def lpips_is_missing(height: int, width: int) -> str | None:
    """Why there is no LPIPS of images of this size on this machine, where nothing is downloaded; None if there is."""
    if min(height, width) < SMALLEST:
        return f"images of {width}×{height} are too small; it takes {SMALLEST} pixels or more"
    if not weights_file().is_file():
        return f"its weights are not on this machine; fetch {URL} into {weights_file().parent}"
    return None


class LPIPS(nn.Module):
    """Distances of 8-bit images (B, 3, H, W) from others, (B,)."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

        self.net = LearnedPerceptualImagePatchSimilarity(NET).net

    @torch.no_grad()
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.net(first.float() / 255, second.float() / 255, normalize=True).flatten()

    def protocol(self) -> dict[str, Any]:
        """What the distances depend on."""
        return {
            "net": NET,
            "sha256": sha256(weights_file()),
            "torchmetrics": importlib.metadata.version("torchmetrics"),
        }
