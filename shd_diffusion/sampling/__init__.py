"""The diffusers pipeline, and N images by index."""

from shd_diffusion.sampling.generate import generate, make_scheduler, sample_indices
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline

__all__ = ["ClassConditionalPipeline", "generate", "make_scheduler", "sample_indices"]
