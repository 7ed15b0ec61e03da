"""A Fréchet distance to watch while training: a few hundred samples, the same extractor as the evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from shd_diffusion.evaluation.extractors import Extractor
from shd_diffusion.evaluation.fid import Statistics, feature_statistics, frechet_distance


@torch.no_grad()
def watch_fid(samples: Tensor, reference: Statistics, extractor: Extractor, batch_size: int = 100) -> float:
    """Fréchet distance of 8-bit samples (N, 3, H, W) from the statistics of the reference's features.

    Args:
        extractor: from `load_extractor`, on the device where it shall run.
    """
    device = next(extractor.parameters()).device
    features = [extractor(batch.to(device)).cpu() for batch in samples.split(batch_size)]
    return frechet_distance(feature_statistics(torch.cat(features)), reference)
