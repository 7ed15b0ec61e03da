"""A Fréchet distance to watch while training: a few hundred samples, the same extractor as the evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


@torch.no_grad()
def watch_fid(samples: Tensor, reference: Tensor, extractor: nn.Module, batch_size: int = 500) -> float:
    """Fréchet distance of 8-bit samples (N, 3, H, W) and reference images (R, 3, H, W).

    Args:
        extractor: from `load_extractor`, on the device where it shall run.
    """
    parameter = next(extractor.parameters())
    metric = FrechetInceptionDistance(extractor, input_img_size=samples.shape[1:], antialias=False)
    metric = metric.to(parameter.device)
    for images, real in ((samples, False), (reference, True)):
        for batch in images.split(batch_size):
            metric.update(batch.to(parameter.device), real=real)
    return metric.compute().item()
