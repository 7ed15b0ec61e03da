"""How a pipeline's denoiser is executed: attention backend, compilation, TF32. Images change by rounding alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import Attention, MochiAttention

from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError, did_you_mean, one_line
from shd_diffusion.models.first_step import until_first_step
from shd_diffusion.models.prompts import denoiser_name
from shd_diffusion.sampling.image_sampler import ImageSampler

ATTENTION_KEY, COMPILE_KEY = "sample.attention", "sample.compile"


def denoiser_of(pipeline: DiffusionPipeline) -> ModelMixin:
    """The model that denoises in a pipeline."""
    model: ModelMixin = getattr(pipeline, denoiser_name(pipeline))
    return model


def set_execution(model: ModelMixin, config: SampleConfig) -> None:
    """Have a denoiser computed as the config says, from now on; TF32 is for `matmul_precision`.

    Raises:
        UserError: the model has no such attention backend.
    """
    if config.attention is not None:
        set_attention(model, config.attention)
    if config.compile:
        model.compile()


@contextmanager
def as_written(model: ModelMixin, config: SampleConfig) -> Iterator[None]:
    """Context in which a model computes operation by operation, as PyTorch counts them: neither compiled nor by another
    library's attention, if `set_execution` has made it so."""
    if config.attention is not None:
        model.reset_attention_backend()
    with torch.compiler.set_stance("force_eager"):
        yield
    if config.attention is not None:
        set_attention(model, config.attention)


@contextmanager
def matmul_precision(config: SampleConfig) -> Iterator[None]:
    """Context in which float32 matrix products use TF32, if the config allows it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if config.allow_tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def set_attention(model: ModelMixin, backend: str) -> None:
    """Have a model's attention computed by one of diffusers' backends.

    Raises:
        UserError: there is none of that name, its library is missing, or the model's class does not ask for one.
    """
    known = [name.value for name in AttentionBackendName]
    if backend not in known:
        raise UserError(f"key `{ATTENTION_KEY}` is {backend}; {did_you_mean(backend, known)}")
    kinds = (Attention, MochiAttention, AttentionModuleMixin)
    processors = [module.processor for module in model.modules() if isinstance(module, kinds)]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise UserError(
            f"key `{ATTENTION_KEY}` is {backend}: diffusers lets no backend be chosen for a {type(model).__name__}; "
            "remove it"
        )
    try:
        with attention_backend():  # `set_attention_backend` would also change it for every other model
            model.set_attention_backend(backend)
    except Exception as error:  # of a missing library, or of the hub where the kernel comes from
        raise UserError(f"key `{ATTENTION_KEY}` is {backend}: {one_line(error)}") from error


def try_execution(sampler: ImageSampler, images: int, config: SampleConfig) -> None:
    """See that a denoiser can be executed so, by one step of so many images.

    Raises:
        UserError: it cannot; the message begins with the key.
    """
    keys = [(ATTENTION_KEY, config.attention), (COMPILE_KEY, config.compile)]
    asked = [f"`{key}` is {str(value).lower()}" for key, value in keys if value]
    if not asked:
        return
    sampler.pipeline.set_progress_bar_config(disable=True)
    try:
        with until_first_step(sampler.pipeline):
            sampler.images(range(images))
    except Exception as error:  # kernels and compilers fail in their own ways
        raise UserError(
            f"key {' and '.join(asked)}: the denoiser cannot be executed so ({one_line(error)})"
        ) from error
