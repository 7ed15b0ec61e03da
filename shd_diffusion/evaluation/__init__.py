"""Metrics of generated images: features, then statistics, then a metric."""

from typing import TYPE_CHECKING

from shd_diffusion.lazy import lazy

if TYPE_CHECKING:
    from shd_diffusion.evaluation.compare import compare_metrics
    from shd_diffusion.evaluation.evaluate import compute_metrics
    from shd_diffusion.evaluation.extractors import extractor_name, load_extractor
    from shd_diffusion.evaluation.metrics import check_settings

__all__ = ["check_settings", "compare_metrics", "compute_metrics", "extractor_name", "load_extractor"]

_FILES = {
    "check_settings": "metrics",
    "compare_metrics": "compare",
    "compute_metrics": "evaluate",
    "extractor_name": "extractors",
    "load_extractor": "extractors",
}

__getattr__ = lazy(__name__, _FILES)  # `compare` needs no torch
