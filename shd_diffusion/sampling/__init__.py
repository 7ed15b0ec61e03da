"""The diffusers pipeline, and N images by index."""

from shd_diffusion.sampling.by_class import sample_images
from shd_diffusion.sampling.generate import generate_images
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline, save_pipeline
from shd_diffusion.sampling.schedulers import check_sampling, make_scheduler, usual_scheduler

__all__ = [
    "ClassConditionalPipeline",
    "check_sampling",
    "generate_images",
    "make_scheduler",
    "sample_images",
    "save_pipeline",
    "usual_scheduler",
]
