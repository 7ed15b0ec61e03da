"""Pipelines that no run of ours has made: diffusers folders and hub names."""

from __future__ import annotations

import hashlib

from diffusers import DiffusionPipeline, DiTPipeline

from shd_diffusion.data.vae import hash_model
from shd_diffusion.errors import UserError
from shd_diffusion.models.adapter import null_label, sample_shape
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline


def open_pipeline(name: str) -> ClassConditionalPipeline:
    """A class-conditional pipeline by its folder or hub name.

    diffusers' DiTPipeline is taken apart and sampled as one of ours: its own call gives the generators of the images
    to no scheduler, and takes 1,000 for the null class of every model.

    Raises:
        UserError: there is none, the hub cannot be reached, or its images are not made by class.
    """
    try:
        kind = DiffusionPipeline.load_config(name).get("_class_name")
    except OSError as error:  # of an unreachable hub diffusers says that it has no such file
        reason = _one_line(error.__context__ or error)
        raise UserError(
            f"{name}: no such run, pipeline, folder of images or .npz here, and not to be had from the hub ({reason})"
        ) from error
    try:
        if kind == DiTPipeline.__name__:
            theirs = DiTPipeline.from_pretrained(name)
            pipeline = ClassConditionalPipeline(theirs.transformer, theirs.scheduler, theirs.vae)
        elif kind == ClassConditionalPipeline.__name__:
            pipeline = ClassConditionalPipeline.from_pretrained(name)
        else:
            raise UserError(
                f"{name}: a {kind} cannot be sampled by class; ClassConditionalPipeline and DiTPipeline can"
            )
        sample_shape(pipeline.denoiser), null_label(pipeline.denoiser)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: this pipeline cannot be loaded ({_one_line(error)})") from error
    return pipeline


def hash_pipeline(pipeline: ClassConditionalPipeline) -> str:
    """SHA-256 of the denoiser's and the VAE's configs and weights."""
    parts = [part for part in (pipeline.denoiser, pipeline.vae) if part is not None]
    return hashlib.sha256(" ".join(map(hash_model, parts)).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
