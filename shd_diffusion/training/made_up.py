"""Samples with conditions that have the right shapes and mean nothing: what a dry run trains on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor
from torch.utils.data import Dataset

from shd_diffusion.config import RunConfig
from shd_diffusion.data import Source, build_source
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import read_json
from shd_diffusion.models.denoiser import num_classes, sample_shape
from shd_diffusion.models.families import TEXT_MASK, family_of
from shd_diffusion.models.hub import try_hub
from shd_diffusion.models.pipeline_folder import find_pipeline

CLIP_TOKENS = 77
VAE_STRIDE = 8  # of every VAE that does not say otherwise

# --- conditions ---------------------------------------------------------------------------------------------------


def _unet(model: Any, clip: int, tokens: int) -> dict[str, Tensor]:
    config = model.config
    condition = {"encoder_hidden_states": torch.zeros(clip, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":  # SDXL: six numbers of size and crop
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        condition["added_cond_kwargs.text_embeds"] = torch.zeros(pooled)
        condition["added_cond_kwargs.time_ids"] = torch.zeros(6)
    return condition


def _with_mask(width: str) -> Callable[[Any, int, int], dict[str, Tensor]]:
    def make(model: Any, clip: int, tokens: int) -> dict[str, Tensor]:
        return {
            "encoder_hidden_states": torch.zeros(tokens, model.config[width]),
            "encoder_attention_mask": torch.ones(tokens, dtype=torch.long),
        }

    return make


def _pixart(model: Any, clip: int, tokens: int) -> dict[str, Tensor]:
    condition = _with_mask("caption_channels")(model, clip, tokens)
    if model.use_additional_conditions:
        condition["added_cond_kwargs.resolution"] = torch.zeros(2)
        condition["added_cond_kwargs.aspect_ratio"] = torch.ones(1)
    return condition


def _sd3(model: Any, clip: int, tokens: int) -> dict[str, Tensor]:
    """CLIP's tokens, then T5's."""
    return {
        "encoder_hidden_states": torch.zeros(clip + tokens, model.config.joint_attention_dim),
        "pooled_projections": torch.zeros(model.config.pooled_projection_dim),
    }


def _flux(model: Any, clip: int, tokens: int) -> dict[str, Tensor]:
    return {
        "encoder_hidden_states": torch.zeros(tokens, model.config.joint_attention_dim),
        "pooled_projections": torch.zeros(model.config.pooled_projection_dim),
        **({"guidance": torch.ones(())} if model.config.guidance_embeds else {}),
    }


def _joint(model: Any, clip: int, tokens: int) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.zeros(tokens, model.config.joint_attention_dim)}


def _cogview4(model: Any, clip: int, tokens: int) -> dict[str, Tensor]:
    sizes = {name: torch.zeros(2) for name in ("original_size", "target_size", "crop_coords")}
    return {"encoder_hidden_states": torch.zeros(tokens, model.config.text_embed_dim), **sizes}


CONDITIONS: dict[str, Callable[[Any, int, int], dict[str, Tensor]]] = {
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SanaTransformer2DModel": _with_mask("caption_channels"),
    "Lumina2Transformer2DModel": _with_mask("cap_feat_dim"),
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "OvisImageTransformer2DModel": _joint,
    "AuraFlowTransformer2DModel": _joint,
    "QwenImageTransformer2DModel": _joint,
    "CogView4Transformer2DModel": _cogview4,
}
"""By the denoiser's class: (model, CLIP's tokens, those of another text encoder) to the condition of a sample."""


def made_up_condition(model: ModelMixin, tokens: int, clip: int = CLIP_TOKENS) -> dict[str, Tensor] | None:
    """The condition of one sample, without a batch axis; None where it is not known what the model is told.

    A label where the model takes one, a prompt of the longest length where it takes one, else nothing.

    Args:
        model: on any device.
        tokens: of a prompt, by a text encoder other than CLIP.
        clip: of a prompt by CLIP.
    """
    if num_classes(model) is not None:
        return {"class_labels": torch.tensor(0)}
    for kind in type(model).__mro__:
        if kind.__name__ in CONDITIONS:
            family, told = family_of(model), CONDITIONS[kind.__name__](model, clip, tokens)
            if family.text:
                length = family.registers + len(told["encoder_hidden_states"])
                told[TEXT_MASK] = torch.ones(length, dtype=torch.bool)
            return family.condition(told)
    takes_more = "encoder_hidden_states" in inspect.signature(type(model).forward).parameters
    return None if takes_more else {}


def text_length(pipeline: str | None, arguments: Mapping[str, Any]) -> int:
    """Tokens of the longest prompt: what the pipeline's call is told, or else its own default."""
    if "max_sequence_length" in arguments:
        return int(arguments["max_sequence_length"])
    found = find_pipeline(pipeline) if pipeline is not None else None
    kind = None if found is None else found.pipeline_class
    parameters = {} if kind is None else dict(inspect.signature(kind.__call__).parameters)
    default = parameters["max_sequence_length"].default if "max_sequence_length" in parameters else None
    return default if isinstance(default, int) else CLIP_TOKENS


# --- samples ------------------------------------------------------------------------------------------------------


class MadeUpSamples(Source):
    """Standard normal samples, with every class among the labels, or the same prompt for all."""

    def __init__(self, shape: tuple[int, ...], condition: Mapping[str, Tensor], classes: int | None) -> None:
        self.shape, self.image_size, self.num_classes = shape, (shape[-2], shape[-1]), classes
        self.needs_noise, self.num_workers, self.null = False, 0, {}
        self.told, self.condition_names = condition, list(condition)
        self.dataset = _Samples(shape, condition, classes, 1)

    def clean(self, items: Mapping[str, Tensor], flipped: Tensor, noise: Tensor | None = None) -> Tensor:
        return items["image"]

    def fingerprint(self) -> str:
        return "made up"

    def of(self, count: int) -> MadeUpSamples:
        """The same with so many samples."""
        other = copy(self)
        other.dataset = _Samples(self.shape, self.told, self.num_classes, count)
        return other


class _Samples(Dataset[dict[str, Tensor]]):
    def __init__(
        self, shape: tuple[int, ...], condition: Mapping[str, Tensor], classes: int | None, count: int
    ) -> None:
        self.images, self.condition, self.classes = torch.randn(count, *shape), condition, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        label = {} if self.classes is None else {"class_labels": torch.tensor(index % self.classes)}
        return {"image": self.images[index], **self.condition, **label}


def make_up_samples(config: RunConfig, model: ModelMixin) -> MadeUpSamples:
    """Samples as the model of a config would be trained on.

    Where a model class is told what is not known here, the cache that the config names is asked, if it is there.

    Raises:
        UserError: neither the config nor a cache tells what samples look like.
    """
    settings = {} if config.prepare is None else config.prepare.prompt_arguments
    condition = made_up_condition(model, text_length(config.within, settings))
    shape = latent_shape(config, model) or sample_shape(model)
    if condition is None or shape is None:
        lacks = "`sample_size` in its config" if condition is not None else "prompt that can be made up"
        try:
            source = build_source(config.trained_on)
        except UserError as error:
            raise UserError(
                f"--dry-run: {type(model).__name__} has no {lacks}, so it needs the cache ({error})"
            ) from error
        return MadeUpSamples(
            source.shape, {name: value[0] for name, value in source.example().items()}, source.num_classes
        )
    return MadeUpSamples(shape, condition, num_classes(model))


def latent_shape(config: RunConfig, model: ModelMixin) -> tuple[int, int, int] | None:
    """(C, H, W) of the latents that `prepare` will make of the config's images; None where it makes none."""
    size = config.data.image_size
    if config.prepare is None or size is None:
        return None
    channels = model.config["in_channels"] // (family_of(model).patch or 1) ** 2
    pipeline = find_pipeline(config.within) if config.within is not None else None
    stride = vae_stride(config.prepare.vae or (None if pipeline is None else pipeline.name))
    return channels, size // stride, size // stride


def vae_stride(path: str | None) -> int:
    """Pixels that a side of a latent stands for, by the config of a VAE or of a pipeline's.

    Raises:
        UserError: it cannot be had from the hub.
    """
    config: Mapping[str, Any] = {}
    if path is not None:
        folder = next((f for f in (Path(path) / "vae", Path(path)) if (f / "config.json").is_file()), None)
        try:
            if folder is not None:
                config = read_json(folder / "config.json")
            elif try_hub(path):
                config = AutoencoderKL.load_config(path, subfolder="vae")
        except OSError as error:
            raise UserError(f"{path}: its VAE's config cannot be had ({one_line(error)})") from error
    halvings = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return VAE_STRIDE if halvings is None else 2 ** (len(halvings) - 1)
