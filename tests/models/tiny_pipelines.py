"""Tiny random text-to-image pipelines of diffusers, whole: tokenizers, text encoders, VAE, denoiser, scheduler.

No file is read and nothing is downloaded. `PIPELINES` builds each family, `SIZE` is the images' height and width,
and `ARGUMENTS` says what a family's call needs beside the prompt to be quick.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

SIZE = (16, 16)  # 8 × 8 latents
TEXT = 12  # tokens of a prompt, where its length is fixed

# --- parts ------------------------------------------------------------------------------------------------------


def random(model: ModelMixin, std: float = 0.2) -> ModelMixin:
    """The model with random parameters all over: as initialised, many predict exactly zero."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """One token a letter."""
    letters = [letter + end for letter in string.ascii_lowercase + string.digits for end in ("", "</w>")]
    vocab = {token: index for index, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return transformers.CLIPTokenizer(vocab, merges=[], model_max_length=TEXT)


def clip(width: int = 8, projection: bool = False) -> transformers.PreTrainedModel:
    config = transformers.CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def t5_tokenizer() -> transformers.T5Tokenizer:
    """One token a letter."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(letter, -2.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    return transformers.T5Tokenizer(vocab, extra_ids=0, model_max_length=TEXT)


def t5(width: int = 8, kind: str = "T5") -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def vae(channels: int = 4, **changes: Any) -> diffusers.AutoencoderKL:
    """Halves the sides."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=channels,
        **changes,
    ).eval()


def unet(heads: int, **changes: Any) -> ModelMixin:
    arguments = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 8,
        "attention_head_dim": heads,  # as diffusers misnames it
    }
    return random(diffusers.UNet2DConditionModel(**arguments | changes))


def noise_scheduler(**changes: Any) -> Any:
    """As Stable Diffusion's."""
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        **changes,
    )


def flow_scheduler(**changes: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**changes)


# --- families ---------------------------------------------------------------------------------------------------


def stable_diffusion(heads: int = 4, **of_scheduler: Any) -> DiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(heads),
        scheduler=noise_scheduler(**of_scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_2(heads: int = 4) -> DiffusionPipeline:
    return stable_diffusion(heads, prediction_type="v_prediction")


def pixart_transformer(heads: int, sample_size: int) -> ModelMixin:
    return random(
        diffusers.PixArtTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=12,  # a third of the width embeds the aspect ratio
            cross_attention_dim=12 * heads,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=sample_size,
            caption_channels=8,
            use_additional_conditions=sample_size == 128,
        )
    )


def pixart_alpha(heads: int = 4) -> DiffusionPipeline:
    """At 1024 pixels, where resolution and aspect ratio are told."""
    return diffusers.PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=pixart_transformer(heads, 128),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def pixart_sigma(heads: int = 4) -> DiffusionPipeline:
    return diffusers.PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=pixart_transformer(heads, 64),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def stable_diffusion_3(heads: int = 4, **changes: Any) -> DiffusionPipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=heads,
        attention_head_dim=8,
        joint_attention_dim=16,
        caption_projection_dim=8 * heads,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        **changes,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=random(transformer),
        scheduler=flow_scheduler(shift=3.0),
        vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(16),
        tokenizer_3=t5_tokenizer(),
    )


def stable_diffusion_35(heads: int = 4) -> DiffusionPipeline:
    return stable_diffusion_3(heads, qk_norm="rms_norm", dual_attention_layers=(0,))


def flux(heads: int = 4, guidance_embeds: bool = True) -> DiffusionPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=heads,
        attention_head_dim=8,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=guidance_embeds,
    )
    return diffusers.FluxPipeline(
        scheduler=flow_scheduler(shift=3.0, use_dynamic_shifting=guidance_embeds),
        vae=vae(scaling_factor=0.36, shift_factor=0.11),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=random(transformer),
    )


def flux_schnell(heads: int = 4) -> DiffusionPipeline:
    return flux(heads, guidance_embeds=False)


def _seeded(build: Callable[..., DiffusionPipeline]) -> Callable[..., DiffusionPipeline]:
    def seeded(heads: int = 4, seed: int = 0) -> DiffusionPipeline:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            pipeline = build(heads)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return seeded


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    name: _seeded(build)
    for name, build in {
        "sd1.5": stable_diffusion,
        "sd2": stable_diffusion_2,
        "pixart-alpha": pixart_alpha,
        "pixart-sigma": pixart_sigma,
        "sd3": stable_diffusion_3,
        "sd3.5": stable_diffusion_35,
        "flux-dev": flux,
        "flux-schnell": flux_schnell,
    }.items()
}
"""By family: (heads, seed) to a pipeline whose denoiser has so many heads."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    "pixart-alpha": {"use_resolution_binning": False, "max_sequence_length": TEXT},
    "pixart-sigma": {"use_resolution_binning": False, "max_sequence_length": TEXT},
    "sd3": {"max_sequence_length": TEXT},
    "sd3.5": {"max_sequence_length": TEXT},
    "flux-dev": {"max_sequence_length": TEXT},
    "flux-schnell": {"max_sequence_length": TEXT},
}
"""Further arguments of a family's call."""
