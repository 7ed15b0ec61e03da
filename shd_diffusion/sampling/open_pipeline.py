"""Open what can be sampled: a run's pipeline, a folder, a hub name."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import nn

import shd_diffusion.models  # noqa: F401 -- diffusers loads only classes of modules that are imported
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.hashing import hash_model
from shd_diffusion.models.denoiser import num_classes
from shd_diffusion.models.factory import DENOISERS, check_weights
from shd_diffusion.models.hub import try_hub
from shd_diffusion.sampling.pipeline import ClassConditionalPipeline

# Pipelines of diffusers that are sampled as a run's, by what they call their denoiser.
BY_CLASS = {"DiTPipeline": "transformer", "DDPMPipeline": "unet", "DDIMPipeline": "unet"}


def open_pipeline(name: str, precision: str = "float32") -> DiffusionPipeline:
    """A pipeline that samples by prompt, by class or unconditionally, by its folder or hub name; its weights are there.

    diffusers' own pipelines by class are taken apart and sampled as a run's: DiTPipeline's call gives the generators of
    the images to no scheduler, and takes 1,000 for the null class of every model. Those by prompt are as they are, but
    for their safety checker, which is left out.

    Raises:
        UserError: there is none, the hub cannot be reached, its images are made from something else, or it is damaged.
    """
    if not (Path(name).exists() or try_hub(name)):
        raise UserError(f"{name}: no such run, pipeline, folder of images or .npz here")
    try:
        kind = DiffusionPipeline.load_config(name)["_class_name"]
    except OSError as error:  # of an unreachable hub diffusers says that it has no such file
        reason = one_line(error.__context__ or error)
        where = "no pipeline in it" if Path(name).exists() else "no such run or pipeline here or on the hub"
        raise UserError(f"{name}: {where} ({reason})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{name}: its model_index.json is damaged ({one_line(error)})") from error
    dtype = getattr(torch, precision)
    try:
        if kind == ClassConditionalPipeline.__name__:
            pipeline = ClassConditionalPipeline.from_pretrained(name, dtype=dtype)
        elif kind in BY_CLASS:
            loaded = getattr(diffusers, kind).from_pretrained(name, dtype=dtype)
            parts = getattr(loaded, BY_CLASS[kind]), loaded.scheduler, getattr(loaded, "vae", None)
            names = DiffusionPipeline.load_config(name).get("id2label")
            pipeline = ClassConditionalPipeline(*parts, id2label=names)
        else:
            if "prompt" not in inspect.signature(getattr(diffusers, kind).__call__).parameters:
                known = ", ".join([ClassConditionalPipeline.__name__, *BY_CLASS])
                raise ValueError(
                    f"a {kind} is not sampled by prompt, by class or unconditionally; {known} are"
                )
            # what it takes for unsafe it would black out, and metrics would count that
            takes = inspect.signature(getattr(diffusers, kind).__init__).parameters
            off = {"safety_checker": None, "requires_safety_checker": False}
            off = {key: value for key, value in off.items() if key in takes}
            pipeline = DiffusionPipeline.from_pretrained(name, dtype=dtype, **off)
        for model in _models(pipeline):
            check_weights(model)
        # nothing is sampled without these
        if isinstance(pipeline, ClassConditionalPipeline):
            pipeline.noise_shape, num_classes(pipeline.denoiser), pipeline.scheduler.set_timesteps
    except Exception as error:
        # Any kind: a missing file is an OSError, a refused value a ValueError, a list for a mapping a TypeError or
        # AttributeError, a wrong shape a RuntimeError, no heads a ZeroDivisionError, torn weights a SafetensorError.
        raise UserError(f"{name}: this pipeline cannot be loaded ({one_line(error)})") from error
    return pipeline


def hash_pipeline(pipeline: DiffusionPipeline) -> str:
    """SHA-256 of the denoiser's, the VAE's and the text encoders' configs and weights."""
    return hashlib.sha256(" ".join(map(hash_model, _models(pipeline))).encode()).hexdigest()


def _models(pipeline: DiffusionPipeline) -> list[Any]:
    """Its models, the denoiser first."""
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    first = [models.pop(name) for name in (*DENOISERS, "vae") if name in models]
    return first + [models[name] for name in sorted(models)]
