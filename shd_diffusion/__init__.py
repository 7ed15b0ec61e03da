"""Squeezing-Heads Distillation of diffusion models (SHD, arXiv 2502.07436).

The method in four names: `plan_merges` says which heads merge when, `squeeze_heads` merges a teacher's attention
maps into as many as the student has, `AttentionCapture` records what the blocks of a model attend to, and
`SHDLoss` is the divergence that the student is trained with; it squeezes as `squeeze_heads` does, but in chunks of
maps (losses/map_divergence.py). Beside it there are the metrics as objects of
torchmetrics, for any training loop: `FrechetDistance(extractor)` and its like.
"""

from typing import TYPE_CHECKING

from shd_diffusion.lazy import lazy

if TYPE_CHECKING:
    from shd_diffusion.attention import AttentionCapture
    from shd_diffusion.evaluation import load_extractor
    from shd_diffusion.evaluation.torch_metrics import (
        CMMD,
        DensityCoverage,
        FrechetDistance,
        InceptionScore,
        KernelDistance,
        MongeDistance,
        PrecisionRecall,
    )
    from shd_diffusion.losses import SHDLoss
    from shd_diffusion.squeezing import plan_merges, squeeze_heads

__all__ = [
    "CMMD",
    "AttentionCapture",
    "DensityCoverage",
    "FrechetDistance",
    "InceptionScore",
    "KernelDistance",
    "MongeDistance",
    "PrecisionRecall",
    "SHDLoss",
    "load_extractor",
    "plan_merges",
    "squeeze_heads",
]

_ROOMS = dict.fromkeys(__all__, "evaluation.torch_metrics") | {
    "AttentionCapture": "attention",
    "SHDLoss": "losses",
    "load_extractor": "evaluation",
    "plan_merges": "squeezing",
    "squeeze_heads": "squeezing",
}


__getattr__ = lazy(__name__, _ROOMS)  # the command line has a guard to set before


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
