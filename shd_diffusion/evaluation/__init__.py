"""Figures of merit of generated images: features, then statistics, then a metric."""

from shd_diffusion.evaluation.compare import compare
from shd_diffusion.evaluation.evaluate import evaluate_run
from shd_diffusion.evaluation.extractors import load_extractor
from shd_diffusion.evaluation.watch import watch_fid

__all__ = ["compare", "evaluate_run", "load_extractor", "watch_fid"]
