"""See that what a config names fits together: each check says which key to change, and how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.config import DistillConfig, RunConfig
from shd_diffusion.data import DataConfig, LatentSource, Source, open_dataset
from shd_diffusion.data.latent_space import load_vae
from shd_diffusion.data.prepare import EncodeConfig
from shd_diffusion.hashing import hash_model
from shd_diffusion.losses import Term
from shd_diffusion.losses.attention_projector import CrossAttentionProjector
from shd_diffusion.losses.shd import SHD
from shd_diffusion.models.denoiser import num_classes, num_tokens
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.models.mdtv2 import num_kept_tokens
from shd_diffusion.models.pipeline_folder import PipelineFolder
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.processes import by_main_process, processes
from shd_diffusion.training.batches import BatchLayout


def check_classes(model: ModelMixin, data: Source) -> None:
    """See that labels mean the same to both.

    Raises:
        ValueError: they do not.
    """
    classes = num_classes(model)
    if classes is not None and classes != data.num_classes:
        raise ValueError(
            f"a model of {classes} classes, but `data` has {data.num_classes or 'none'}; make them equal"
        )


def check_pair(teacher: Teacher, student: ModelMixin, path: str) -> None:
    """See that both are conditioned on the same.

    Raises:
        ValueError: they are not.
    """
    classes = num_classes(student), num_classes(teacher.model)
    if classes[0] != classes[1]:
        raise ValueError(
            f"{path} is a model of {classes[1] or 'no'} classes, but the student of {classes[0] or 'none'}; "
            "make them equal"
        )


def check_prompts(pipeline: PipelineFolder | None, data: Source) -> None:
    """See that the data have prompts where they are needed, encoded as the pipeline does.

    Raises:
        ValueError: they do not.
    """
    encoded = data.prompts_sha256 if isinstance(data, LatentSource) else None
    if pipeline is None or not pipeline.takes_prompts:
        if encoded is not None:
            raise ValueError(
                "the cache has captions, but the model stands in no text-to-image pipeline; set `pipeline`, or "
                "prepare the data without captions"
            )
        return
    if encoded is None:
        raise ValueError(
            f"{pipeline.name} makes images from prompts; name where the captions are, add a section `prepare`, and "
            "run `shd-diffusion prepare` first"
        )
    if encoded != by_main_process(pipeline.hash_prompt_parts):  # gigabytes of text encoders
        raise ValueError(
            f"the captions in the cache were encoded by other text encoders or tokenizers than {pipeline.name} has; "
            "run `shd-diffusion prepare` with another `prepare.output`"
        )


def check_co_training(config: RunConfig) -> None:
    """See that a teacher can train too.

    Raises:
        ValueError: it cannot; the message names the other key.
    """
    assert isinstance(config, DistillConfig)
    hindrances = {
        "`train.shard` leaves no room for it: set it to false": config.train.shard,
        "`teacher.device` must be accelerator": config.teacher.device == "cpu",
        "`teacher.dtype` must be float32": config.teacher.dtype != "float32",
        "`train.mix` would have it learn mixed images: set it to none": config.train.mix != "none",
    }
    for hindrance, present in hindrances.items():
        if present:
            raise ValueError(
                f"a teacher that trains too wants other settings: {hindrance}; or remove this key"
            )


def check_scaled_gradients(terms: Mapping[str, Term], shard: bool, precision: str) -> None:
    """See that float16's gradients can be scaled: one optimiser scales those of shards, or those of whole parameters.

    Raises:
        ValueError: they cannot.
    """
    whole = [name for name, term in terms.items() if any(True for _ in term.parameters())]
    if shard and precision == "fp16" and whole:
        raise ValueError(
            f"key `train.mixed_precision`: fp16 cannot scale the gradients of `losses.{whole[0]}`, whose parameters "
            "are whole, beside those of `train.shard`; set bf16"
        )


NOT_OF_IMAGES = {"path", "horizontal_flip", "verify", "num_workers"}
"""Keys of data that change no image."""


def check_prepared(cache: LatentSource, images: DataConfig, settings: EncodeConfig) -> None:
    """See that a cache was made of the images that a config names, which need not be on this machine, and as far as the
    config says so in the way that it names.

    Raises:
        ValueError: it was made of others, or otherwise.
    """
    asked = {f"data.{key}": value for key, value in images.model_dump().items() if key not in NOT_OF_IMAGES}
    made = {f"data.{key}": value for key, value in cache.images.items()}
    asked |= {
        f"prepare.{key}": value for key, value in settings.model_dump(include=settings.changed()).items()
    }
    made |= {f"prepare.{key}": value for key, value in cache.encoded.items()}
    for key, value in asked.items():
        if made.get(key, value) != value:
            raise ValueError(
                f"key `{key}`: is {value!r}, but the cache was made with {made[key]!r}; set it so, or "
                "prepare another one (`prepare.output`)"
            )
    moved = images.path is not None and images.path != cache.images.get("path") and Path(images.path).exists()
    if moved and open_dataset(images).fingerprint() != cache.images_sha256:
        raise ValueError(
            f"key `data.path`: {images.path} has other images than the cache was made of "
            f"({cache.images.get('path')}); set it so, or prepare another one (`prepare.output`)"
        )


def check_passes(config: RunConfig, terms: Mapping[str, Term]) -> None:
    """See that every pass has as many images as terms of a batch need, and mixing does.

    Raises:
        ValueError: too few, which would be a loss of 0 without a word, or fewer than there are processes.
    """
    train, num_processes = config.train, processes().num_processes
    layouts = [
        BatchLayout(train.batch_size, train.micro_batch_size, num_processes, process)
        for process in range(num_processes)
    ]
    smallest = min(len(places) for layout in layouts for places in layout.passes)
    needed = {f"losses.{name}": term.fewest_samples for name, term in terms.items()}
    needed |= {} if train.mix == "none" else {"train.mix": 2}
    for what, fewest in needed.items():
        if smallest < fewest:
            raise ValueError(
                f"`{what}` compares {fewest} images of a pass or more, and some have {smallest}; raise `batch_size` or "
                "`micro_batch_size`"
            )


def check_guidance(guidance_range: list[float] | None, example: dict[str, Tensor]) -> None:
    """See that a guidance scale is told to the models that want one.

    Raises:
        ValueError: it is not, or to others.
    """
    if "guidance" in example:
        if guidance_range is None:
            raise ValueError(
                "the model is told the guidance scale, so train it on those that it will be used with; give the "
                "least and the largest, such as [1, 5]"
            )
        if guidance_range[0] > guidance_range[1]:
            raise ValueError(f"{guidance_range} ends before it begins; give the least and the largest")
    elif guidance_range is not None:
        raise ValueError("the model is told no guidance scale; remove it")


def check_latent_space(pipeline: PipelineFolder, data: Source) -> None:
    """See that the data are in the space that the teacher was trained in, and of its size.

    Raises:
        ValueError: they are not, as far as the teacher's pipeline tells.
    """
    path = pipeline.name
    if pipeline.sample_shape not in (None, tuple(data.shape)):
        raise ValueError(
            f"{path} was trained on samples {pipeline.sample_shape}, but `data` gives {tuple(data.shape)}; make "
            "them equal"
        )
    if not isinstance(data, LatentSource):
        if pipeline.has("vae"):
            raise ValueError(
                f"{path} works on latents, but `data` gives pixels; run `shd-diffusion prepare` first"
            )
        return
    if not pipeline.has("vae"):
        raise ValueError(f"{path} works on pixels, but `data` gives latents; give the images themselves")
    if hash_model(load_vae(path)) != data.vae_sha256:
        raise ValueError(
            f"{path} works on latents of its own VAE, but `data.path` was encoded by another ({data.vae}); "
            "prepare the data with the teacher's"
        )


def check_masking(model: ModelMixin, teacher: Teacher | None, mask_ratio: float) -> None:
    """See that the models can be trained masked, if they are to be.

    Raises:
        ValueError: a model takes no token mask, the teacher's tokens are others, or none could be left.
    """
    if not mask_ratio:
        return
    tokens = num_tokens(model)
    num_kept_tokens(tokens, mask_ratio, torch.Generator())
    if teacher is not None and (other := num_tokens(teacher.model)) != tokens:
        raise ValueError(f"one mask cannot be for {tokens} tokens of the student and {other} of the teacher")


def check_variance(predicted: bool, process: ForwardProcess) -> None:
    """See that the variational bound of a predicted variance is finite at every timestep.

    Raises:
        ValueError: it is not.
    """
    bound = process.table is not None and (process.objective != "epsilon" or bool(process.table[0].min() > 0))
    if predicted and not bound:
        raise ValueError(
            "a variance is predicted, which a flow, or noise without any signal, has no bound for; set "
            "`out_channels` to `in_channels`"
        )


def check_timesteps(shd: SHD, process: ForwardProcess) -> None:
    """See that SHD counts at a timestep that there is.

    Raises:
        ValueError: it never would.
    """
    limits = shd.config.timesteps
    if limits is not None and not 0 <= limits[0] < process.num_timesteps:
        raise ValueError(
            f"{limits} hold none of the timesteps, 0 to {process.num_timesteps - 1}; SHD would never count"
        )


def check_projectors(terms: Mapping[str, Term], sizes: int, mask_ratio: float) -> None:
    """See that projectors which mix tokens always get the same ones.

    Args:
        sizes: how many sizes the images have.

    Raises:
        ValueError: they would not.
    """
    if not any(isinstance(module, CrossAttentionProjector) for t in terms.values() for module in t.modules()):
        return
    if sizes > 1:
        raise ValueError("`attention` is for images of one size, and the cache has several; set `linear`")
    if mask_ratio:
        raise ValueError("`attention` is for all tokens, and `train.mask_ratio` hides some; set `linear`")
