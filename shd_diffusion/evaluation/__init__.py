"""Metrics of generated images: features, then statistics, then a metric."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Imported when they are asked for: `compare` needs no torch."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
