"""Tiny random models of every family, with inputs: one table for all tests that must hold for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor, nn

from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel

BATCH, TEXT = 2, 5  # samples, and text tokens where there are any


@dataclass(frozen=True)
class Family:
    """How to build one tiny model and what to call it with.

    Attributes:
        model: class of the model.
        arguments: of its constructor.
        inputs: of its forward, drawn anew at each call.
        records: names and kinds of the records that a forward pass leaves, in their order.
    """

    model: type[nn.Module]
    arguments: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    records: tuple[tuple[str, str], ...]

    def build(self, seed: int = 0) -> nn.Module:
        """A model in evaluation mode, every parameter random: as initialised, many compute exactly zero."""
        torch.manual_seed(seed)
        model = self.model(**self.arguments)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model.eval()

    def draw(self, seed: int = 1) -> dict[str, Any]:
        """Inputs of one forward pass."""
        torch.manual_seed(seed)
        return self.inputs()


def output(result: Any) -> Tensor:
    """The prediction out of whatever a model returns, as one vector."""
    result = getattr(result, "sample", result)
    parts = [result] if isinstance(result, Tensor) else list(result)  # Z-Image takes and returns lists
    return torch.cat([part.flatten() for part in parts])


def _image(channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(BATCH, channels, size, size)


def _text(width: int) -> Tensor:
    return torch.randn(BATCH, TEXT, width)


def _padding(dtype: torch.dtype = torch.bool) -> Tensor:
    """Text masks: the first sample is padded."""
    mask = torch.ones(BATCH, TEXT)
    mask[0, 3:] = 0
    return mask.to(dtype)


def _steps() -> Tensor:
    return torch.tensor([3, 700])


def _ids(rows: int, columns: int, axes: int) -> Tensor:
    """Positions of image tokens for rotary embeddings."""
    ids = torch.zeros(rows, columns, axes)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return ids.flatten(0, 1)


SMALL = {"num_attention_heads": 3, "attention_head_dim": 8}

MDTV2 = {
    **SMALL,
    "in_channels": 4,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
PACKED = {
    **SMALL,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 6,
    "axes_dims_rope": (2, 2, 4),
}
JOINT_AND_SINGLE = (
    ("transformer_blocks.0.attn", "joint"),
    ("transformer_blocks.0.attn:context", "joint"),
    ("single_transformer_blocks.0.attn", "self"),
)


def _packed() -> dict[str, Any]:
    """What the kin of Flux are called with."""
    return {
        "hidden_states": torch.randn(BATCH, 12, 4),
        "encoder_hidden_states": _text(6),
        "timestep": torch.tensor([0.1, 0.9]),
        "img_ids": _ids(3, 4, 3),
        "txt_ids": torch.zeros(TEXT, 3),
    }


HUNYUAN_VIDEO = {
    **SMALL,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 2,
    "text_embed_dim": 6,
    "pooled_projection_dim": 4,
    "rope_axes_dim": (2, 2, 4),
}
HUNYUAN_VIDEO_RECORDS = (
    ("context_embedder.token_refiner.refiner_blocks.0.attn", "self"),
    ("transformer_blocks.0.attn", "joint"),
    ("transformer_blocks.0.attn:context", "joint"),
    ("single_transformer_blocks.0.attn", "joint"),
    ("single_transformer_blocks.0.attn:context", "joint"),
)


def _hunyuan_video() -> dict[str, Any]:
    return {
        "timestep": _steps(),
        "encoder_hidden_states": _text(6),
        "encoder_attention_mask": _padding(torch.float32),
        "pooled_projections": torch.randn(BATCH, 4),
        "guidance": torch.ones(BATCH),
    }


FAMILIES: dict[str, Family] = {
    "dit": Family(
        diffusers.DiTTransformer2DModel,
        {
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
        },
        lambda: {"hidden_states": _image(), "timestep": _steps(), "class_labels": torch.tensor([1, 10])},
        (("transformer_blocks.0.attn1", "self"), ("transformer_blocks.1.attn1", "self")),
    ),
    "mdtv2": Family(
        MDTv2Transformer2DModel,
        MDTV2,
        lambda: {"hidden_states": _image(), "timestep": _steps(), "class_labels": torch.tensor([1, 10])},
        (
            ("in_blocks.0.attn", "self"),
            ("out_blocks.0.attn", "self"),
            ("decoder_blocks.0.attn", "self"),
            ("decoder_blocks.1.attn", "self"),
        ),
    ),
    "mdtv2 masked": Family(
        MDTv2Transformer2DModel,
        MDTV2,
        lambda: {
            "hidden_states": _image(),
            "timestep": _steps(),
            "class_labels": torch.tensor([1, 10]),
            "ids_keep": torch.rand(BATCH, 16).argsort(dim=1)[:, :7],
        },
        (
            ("in_blocks.0.attn", "self"),
            ("out_blocks.0.attn", "self"),
            ("side_block.attn", "self"),
            ("decoder_blocks.0.attn", "self"),
            ("decoder_blocks.1.attn", "self"),
        ),
    ),
    "transformer2d": Family(
        diffusers.Transformer2DModel,
        {**SMALL, "in_channels": 24, "norm_num_groups": 4, "cross_attention_dim": 6},
        lambda: {
            "hidden_states": _image(24, 4),
            "encoder_hidden_states": _text(6),
            "encoder_attention_mask": _padding(),
            "attention_mask": (torch.arange(16) < 12).expand(BATCH, -1),
        },
        (("transformer_blocks.0.attn1", "self"), ("transformer_blocks.0.attn2", "cross")),
    ),
    "unet2d": Family(
        diffusers.UNet2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 8,
        },
        lambda: {"sample": _image(), "timestep": _steps()},
        (
            ("down_blocks.1.attentions.0", "self"),
            ("mid_block.attentions.0", "self"),
            ("up_blocks.0.attentions.0", "self"),
            ("up_blocks.0.attentions.1", "self"),
        ),
    ),
    "unet2d-condition": Family(
        diffusers.UNet2DConditionModel,
        {
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 6,
            "attention_head_dim": 2,
        },
        lambda: {
            "sample": _image(),
            "timestep": _steps(),
            "encoder_hidden_states": _text(6),
            "encoder_attention_mask": _padding(),
        },
        tuple(
            (f"{stage}.transformer_blocks.0.{attention}", kind)
            for stage in (
                "down_blocks.1.attentions.0",
                "mid_block.attentions.0",
                "up_blocks.0.attentions.0",
                "up_blocks.0.attentions.1",
            )
            for attention, kind in (("attn1", "self"), ("attn2", "cross"))
        ),
    ),
    "unet added keys": Family(
        diffusers.UNet2DConditionModel,
        {
            "sample_size": 8,
            "down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": ("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 6,
            "attention_head_dim": 8,
        },
        lambda: {"sample": _image(), "timestep": _steps(), "encoder_hidden_states": _text(6)},
        (
            ("down_blocks.1.attentions.0", "joint"),
            ("mid_block.attentions.0", "joint"),
            ("up_blocks.0.attentions.0", "joint"),
            ("up_blocks.0.attentions.1", "joint"),
        ),
    ),
    "uvit2d": Family(
        diffusers.UVit2DModel,
        {
            "hidden_size": 24,
            "cond_embed_dim": 6,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 6,
            "vocab_size": 12,
            "codebook_size": 10,
            "in_channels": 8,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "downsample": True,
            "upsample": True,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 3,
            "intermediate_size": 32,
            "sample_size": 8,
        },
        lambda: {
            "input_ids": torch.randint(0, 10, (BATCH, 8, 8)),
            "encoder_hidden_states": _text(6),
            "pooled_text_emb": torch.randn(BATCH, 6),
            "micro_conds": torch.randn(BATCH, 5),
        },
        (
            ("down_block.attention_blocks.0.attn1", "cross"),
            ("down_block.attention_blocks.0.attn2", "cross"),
            ("transformer_layers.0.attn1", "self"),
            ("transformer_layers.0.attn2", "cross"),
            ("up_block.attention_blocks.0.attn1", "cross"),
            ("up_block.attention_blocks.0.attn2", "cross"),
        ),
    ),
    "pixart": Family(
        diffusers.PixArtTransformer2DModel,
        {
            **SMALL,
            "in_channels": 4,
            "num_layers": 1,
            "cross_attention_dim": 24,
            "sample_size": 8,
            "caption_channels": 6,
            "use_additional_conditions": False,
        },
        lambda: {
            "hidden_states": _image(),
            "timestep": _steps(),
            "encoder_hidden_states": _text(6),
            "encoder_attention_mask": _padding(),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        (("transformer_blocks.0.attn1", "self"), ("transformer_blocks.0.attn2", "cross")),
    ),
    "hunyuan-dit": Family(
        diffusers.HunyuanDiT2DModel,
        {
            **SMALL,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 24,
            "num_layers": 2,
            "cross_attention_dim": 6,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "text_len": TEXT,
            "text_len_t5": TEXT,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda: {
            "hidden_states": _image(),
            "timestep": torch.tensor([3.0, 700.0]),
            "encoder_hidden_states": _text(6),
            "text_embedding_mask": _padding(),
            "encoder_hidden_states_t5": _text(8),
            "text_embedding_mask_t5": _padding(),
            "image_rotary_emb": (torch.randn(16, 8), torch.randn(16, 8)),
        },
        (
            ("blocks.0.attn1", "self"),
            ("blocks.0.attn2", "cross"),
            ("blocks.1.attn1", "self"),
            ("blocks.1.attn2", "cross"),
        ),
    ),
    "sana": Family(
        diffusers.SanaTransformer2DModel,
        {
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 6,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": _image(),
            "timestep": _steps(),
            "encoder_hidden_states": _text(6),
            "encoder_attention_mask": _padding(),
        },
        (("transformer_blocks.0.attn2", "cross"), ("transformer_blocks.1.attn2", "cross")),
    ),
    "sd3": Family(
        diffusers.SD3Transformer2DModel,
        {
            **SMALL,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": 6,
            "caption_projection_dim": 24,
            "pooled_projection_dim": 4,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        lambda: {
            "hidden_states": _image(),
            "timestep": _steps(),
            "encoder_hidden_states": _text(6),
            "pooled_projections": torch.randn(BATCH, 4),
        },
        (
            ("transformer_blocks.0.attn", "joint"),
            ("transformer_blocks.0.attn:context", "joint"),
            ("transformer_blocks.0.attn2", "self"),
            ("transformer_blocks.1.attn", "joint"),  # the text ends here
        ),
    ),
    "auraflow": Family(
        diffusers.AuraFlowTransformer2DModel,
        {
            **SMALL,
            "sample_size": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "joint_attention_dim": 6,
            "caption_projection_dim": 24,
            "pos_embed_max_size": 64,
        },
        lambda: {
            "hidden_states": _image(),
            "timestep": torch.tensor([0.1, 0.9]),
            "encoder_hidden_states": _text(6),
        },
        (
            ("joint_transformer_blocks.0.attn", "joint"),
            ("joint_transformer_blocks.0.attn:context", "joint"),
            ("single_transformer_blocks.0.attn", "self"),
        ),
    ),
    "flux": Family(
        diffusers.FluxTransformer2DModel,
        {
            **SMALL,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 6,
            "pooled_projection_dim": 4,
            "axes_dims_rope": (2, 2, 4),
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 12, 4),
            "encoder_hidden_states": _text(6),
            "pooled_projections": torch.randn(BATCH, 4),
            "timestep": torch.tensor([0.1, 0.9]),
            "img_ids": _ids(3, 4, 3),
            "txt_ids": torch.zeros(TEXT, 3),
        },
        (
            ("transformer_blocks.0.attn", "joint"),
            ("transformer_blocks.0.attn:context", "joint"),
            ("single_transformer_blocks.0.attn", "self"),
        ),
    ),
    "chroma": Family(
        diffusers.ChromaTransformer2DModel,
        {
            **SMALL,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 6,
            "axes_dims_rope": (2, 2, 4),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 8,
            "approximator_layers": 1,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 12, 4),
            "encoder_hidden_states": _text(6),
            "timestep": torch.tensor([0.1, 0.9]),
            "img_ids": _ids(3, 4, 3),
            "txt_ids": torch.zeros(TEXT, 3),
            "attention_mask": torch.cat([_padding(), torch.ones(BATCH, 12, dtype=torch.bool)], dim=1),
        },
        (
            ("transformer_blocks.0.attn", "joint"),
            ("transformer_blocks.0.attn:context", "joint"),
            ("single_transformer_blocks.0.attn", "self"),
        ),
    ),
    "flux2": Family(
        diffusers.Flux2Transformer2DModel,
        {
            **SMALL,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 6,
            "timestep_guidance_channels": 8,
            "axes_dims_rope": (2, 2, 2, 2),
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 12, 4),
            "encoder_hidden_states": _text(6),
            "timestep": torch.tensor([0.1, 0.9]),
            "guidance": torch.ones(BATCH),
            "img_ids": _ids(3, 4, 4),
            "txt_ids": torch.zeros(TEXT, 4),
        },
        (
            ("transformer_blocks.0.attn", "joint"),
            ("transformer_blocks.0.attn:context", "joint"),
            ("single_transformer_blocks.0.attn", "self"),
        ),
    ),
    "lumina2": Family(
        diffusers.Lumina2Transformer2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 8,
            "axes_dim_rope": (2, 2, 2),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 6,
        },
        lambda: {
            "hidden_states": _image(),
            "timestep": torch.tensor([0.1, 0.9]),
            "encoder_hidden_states": _text(6),
            "encoder_attention_mask": _padding(),
        },
        (("noise_refiner.0.attn", "self"), ("context_refiner.0.attn", "self"), ("layers.0.attn", "self")),
    ),
    "cogview4": Family(
        diffusers.CogView4Transformer2DModel,
        {
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "text_embed_dim": 6,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
            "rope_axes_dim": (8, 8),
        },
        lambda: {
            "hidden_states": _image(),
            "timestep": _steps(),
            "encoder_hidden_states": _text(6),
            "original_size": torch.tensor([[8.0, 8.0]] * BATCH),
            "target_size": torch.tensor([[8.0, 8.0]] * BATCH),
            "crop_coords": torch.zeros(BATCH, 2),
            "attention_mask": _padding(torch.float32),
        },
        (("transformer_blocks.0.attn1", "joint"), ("transformer_blocks.0.attn1:context", "joint")),
    ),
    "qwen-image": Family(
        diffusers.QwenImageTransformer2DModel,
        {
            **SMALL,
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 1,
            "joint_attention_dim": 6,
            "axes_dims_rope": (2, 2, 4),
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 12, 4),
            "encoder_hidden_states": _text(6),
            "encoder_hidden_states_mask": _padding(),
            "timestep": torch.tensor([0.1, 0.9]),
            "img_shapes": [[(1, 3, 4)]] * BATCH,
        },
        (("transformer_blocks.0.attn", "joint"), ("transformer_blocks.0.attn:context", "joint")),
    ),
    "wan": Family(
        diffusers.WanTransformer3DModel,
        {
            "num_attention_heads": 3,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 6,
            "freq_dim": 8,
            "ffn_dim": 16,
            "num_layers": 1,
            "rope_max_seq_len": 16,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 2, 4, 4),
            "timestep": _steps(),
            "encoder_hidden_states": _text(6),
        },
        (("blocks.0.attn1", "self"), ("blocks.0.attn2", "cross")),
    ),
    "wan image-to-video": Family(
        diffusers.WanTransformer3DModel,
        {
            "num_attention_heads": 3,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 6,
            "freq_dim": 8,
            "ffn_dim": 16,
            "num_layers": 1,
            "rope_max_seq_len": 16,
            "image_dim": 6,
            "added_kv_proj_dim": 36,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 2, 4, 4),
            "timestep": _steps(),
            "encoder_hidden_states": torch.randn(BATCH, 512, 6),  # a length that diffusers hard-codes here
            "encoder_hidden_states_image": torch.randn(BATCH, 3, 6),
        },
        (("blocks.0.attn1", "self"), ("blocks.0.attn2:image", "cross"), ("blocks.0.attn2", "cross")),
    ),
    "z-image": Family(
        diffusers.ZImageTransformer2DModel,
        {
            "in_channels": 4,
            "dim": 24,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 6,
            "axes_dims": [2, 2, 4],
            "axes_lens": [256, 16, 16],
        },
        lambda: {
            "x": [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 4)],
            "t": torch.tensor([0.1, 0.9]),
            "cap_feats": [torch.randn(5, 6), torch.randn(40, 6)],
        },
        (
            ("noise_refiner.0.attention", "self"),
            ("context_refiner.0.attention", "self"),
            ("layers.0.attention", "self"),
        ),
    ),
    "prx": Family(
        diffusers.PRXTransformer2DModel,
        {
            "in_channels": 4,
            "context_in_dim": 6,
            "hidden_size": 24,
            "num_heads": 3,
            "depth": 1,
            "axes_dim": [4, 4],
        },
        lambda: {
            "hidden_states": _image(),
            "timestep": torch.tensor([0.1, 0.9]),
            "encoder_hidden_states": _text(6),
            "attention_mask": _padding(),
        },
        (("blocks.0.attention", "joint"),),
    ),
    "bria": Family(
        diffusers.BriaTransformer2DModel,
        {**PACKED, "pooled_projection_dim": None},
        _packed,
        JOINT_AND_SINGLE,
    ),
    "bria-fibo": Family(
        diffusers.BriaFiboTransformer2DModel,
        {**PACKED, "pooled_projection_dim": None, "text_encoder_dim": 3},
        lambda: {**_packed(), "text_encoder_layers": [torch.randn(BATCH, TEXT, 3)] * 2},
        JOINT_AND_SINGLE,
    ),
    "longcat-image": Family(
        diffusers.LongCatImageTransformer2DModel,
        {**PACKED, "pooled_projection_dim": 6},
        lambda: {**_packed(), "guidance": torch.full((BATCH,), 3.5)},
        JOINT_AND_SINGLE,
    ),
    "ovis-image": Family(
        diffusers.OvisImageTransformer2DModel, {**PACKED, "out_channels": 4}, _packed, JOINT_AND_SINGLE
    ),
    "hunyuan-video": Family(
        diffusers.HunyuanVideoTransformer3DModel,
        HUNYUAN_VIDEO,
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 2, 4, 4),
            **_hunyuan_video(),
        },
        HUNYUAN_VIDEO_RECORDS,
    ),
    "framepack": Family(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        {**HUNYUAN_VIDEO, "has_image_proj": True, "image_proj_dim": 6, "has_clean_x_embedder": True},
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 3, 4, 4),
            **_hunyuan_video(),
            "image_embeds": torch.randn(BATCH, 4, 6),
            "indices_latents": torch.ones(3),
            "latents_clean": torch.randn(BATCH, 4, 2, 4, 4),
            "indices_latents_clean": torch.ones(2),
            "latents_history_2x": torch.randn(BATCH, 4, 2, 4, 4),
            "indices_latents_history_2x": torch.ones(2),
            "latents_history_4x": torch.randn(BATCH, 4, 8, 4, 4),
            "indices_latents_history_4x": torch.ones(8),
        },
        HUNYUAN_VIDEO_RECORDS,
    ),
    "hunyuan-video 1.5": Family(
        diffusers.HunyuanVideo15Transformer3DModel,
        {
            **SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 1,
            "text_embed_dim": 6,
            "text_embed_2_dim": 4,
            "image_embed_dim": 6,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 8,
            "task_type": "t2v",
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 1, 4, 4),
            "timestep": torch.tensor([3.0, 700.0]),
            "encoder_hidden_states": _text(6),
            "encoder_hidden_states_2": torch.randn(BATCH, 4, 4),
            "encoder_attention_mask": _padding(torch.float32),
            "encoder_attention_mask_2": torch.ones(BATCH, 4),
            "image_embeds": torch.zeros(BATCH, 3, 6),
        },
        (
            ("context_embedder.token_refiner.refiner_blocks.0.attn", "self"),
            ("transformer_blocks.0.attn", "joint"),
            ("transformer_blocks.0.attn:context", "joint"),
        ),
    ),
    "easyanimate": Family(
        diffusers.EasyAnimateTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "mmdit_layers": 1,
            "num_layers": 2,
            "patch_size": 2,
            "text_embed_dim": 6,
            "time_embed_dim": 8,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 1, 8, 8),
            "timestep": _steps(),
            "encoder_hidden_states": _text(6),
        },
        (
            ("transformer_blocks.0.attn1", "joint"),
            ("transformer_blocks.0.attn1:context", "joint"),
            ("transformer_blocks.1.attn1", "joint"),
        ),
    ),
    "motif-video": Family(
        diffusers.MotifVideoTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_decoder_layers": 0,
            "patch_size": 1,
            "text_embed_dim": 6,
            "image_embed_dim": 4,
            "rope_axes_dim": (4, 4, 4),
            "enable_text_cross_attention_dual": False,
            "enable_text_cross_attention_single": False,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 2, 4, 4),
            "timestep": _steps(),
            "encoder_hidden_states": _text(6),
        },
        (
            ("transformer_blocks.0.attn", "joint"),
            ("transformer_blocks.0.attn:context", "joint"),
            ("single_transformer_blocks.0.attn", "joint"),
            ("single_transformer_blocks.0.attn:context", "joint"),
        ),
    ),
    "ideogram4": Family(
        diffusers.Ideogram4Transformer2DModel,
        {
            **SMALL,
            "in_channels": 4,
            "num_layers": 1,
            "intermediate_size": 16,
            "adaln_dim": 8,
            "llm_features_dim": 6,
            "mrope_section": (2, 1, 1),
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 9, 4),
            "encoder_hidden_states": torch.randn(BATCH, 9, 6),
            "timestep": torch.tensor([0.1, 0.9]),
            "position_ids": torch.arange(9)[None, :, None].expand(BATCH, -1, 3),
            "segment_ids": torch.ones(BATCH, 9, dtype=torch.long),
            "indicator": torch.tensor([LLM_TOKEN_INDICATOR] * TEXT + [OUTPUT_IMAGE_INDICATOR] * 4).expand(
                BATCH, -1
            ),
        },
        (("layers.0.attention", "self"),),
    ),
    "joyimage": Family(
        diffusers.JoyImageEditTransformer3DModel,
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 6,
            "num_layers": 1,
            "rope_dim_list": [4, 6, 6],
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 1, 4, 4),
            "encoder_hidden_states": _text(6),
            "timestep": _steps(),
        },
        (
            ("double_blocks.0.attn", "joint"),
            ("double_blocks.0.attn:context", "joint"),
        ),
    ),
    "krea2": Family(
        diffusers.Krea2Transformer2DModel,
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_key_value_heads": 2,
            "in_channels": 4,
            "num_layers": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 16,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 4),
            "encoder_hidden_states": torch.randn(BATCH, TEXT, 3, 8),
            "timestep": torch.tensor([0.1, 0.9]),
            "position_ids": torch.cat([torch.zeros(TEXT, 3), _ids(2, 2, 3)]),
            "encoder_attention_mask": _padding(),
        },
        (
            ("text_fusion.layerwise_blocks.0.attn", "self"),
            ("text_fusion.refiner_blocks.0.attn", "self"),
            ("transformer_blocks.0.attn", "self"),
        ),
    ),
    "lumina-next": Family(
        diffusers.LuminaNextDiT2DModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": 6,
            "learn_sigma": False,
        },
        lambda: {
            "hidden_states": _image(),
            "encoder_hidden_states": _text(6),
            "timestep": torch.tensor([0.1, 0.9]),
            "encoder_mask": _padding(torch.float32),
            "image_rotary_emb": torch.randn(384, 384, 4),
            "cross_attention_kwargs": {},
        },
        (("layers.0.attn1", "self"), ("layers.0.attn2", "cross")),
    ),
    "cosmos3": Family(
        diffusers.Cosmos3OmniTransformer,
        {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "hidden_size": 12,
            "intermediate_size": 16,
            "latent_channel": 2,
            "latent_patch_size": 1,
            "patch_latent_dim": 2,
            "num_hidden_layers": 1,
            "rope_axes_dim": [1, 1, 1],
            "vocab_size": 8,
        },
        lambda: {
            "input_ids": torch.tensor([1, 2, 3]),
            "text_indexes": torch.arange(3),
            "position_ids": torch.arange(7).expand(3, -1),
            "und_len": 3,
            "sequence_length": 7,
            "vision_tokens": [torch.randn(1, 2, 1, 2, 2)],
            "vision_token_shapes": [(1, 2, 2)],
            "vision_sequence_indexes": torch.arange(3, 7),
            "vision_mse_loss_indexes": torch.arange(3, 7),
            "vision_timesteps": torch.ones(4),
            "vision_noisy_frame_indexes": [torch.tensor([0])],
        },
        (
            ("layers.0.self_attn", "joint"),
            ("layers.0.self_attn:context", "joint"),
        ),
    ),
    "ace-step": Family(
        diffusers.AceStepTransformer1DModel,
        {
            "hidden_size": 32,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "patch_size": 2,
            "sliding_window": 2,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 8, 4),
            "timestep": torch.tensor([0.1, 0.9]),
            "timestep_r": torch.tensor([0.1, 0.9]),
            "encoder_hidden_states": _text(32),
            "context_latents": torch.randn(BATCH, 8, 8),
        },
        (
            ("layers.0.self_attn", "self"),
            ("layers.0.cross_attn", "cross"),
            ("layers.1.self_attn", "self"),
            ("layers.1.cross_attn", "cross"),
        ),
    ),
    "stable-audio-3": Family(
        diffusers.StableAudio3DiTModel,
        {
            "io_channels": 4,
            "patch_size": 1,
            "embed_dim": 32,
            "depth": 1,
            "num_heads": 4,
            "cond_token_dim": 6,
            "global_cond_dim": 4,
            "local_add_cond_dim": 4,
            "timestep_features_dim": 8,
            "ff_mult": 2,
            "num_memory_tokens": 3,
            "use_differential_attention": False,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 8),
            "timestep": torch.tensor([0.1, 0.9]),
            "encoder_hidden_states": _text(6),
            "global_hidden_states": torch.randn(BATCH, 4),
        },
        (
            ("transformer_blocks.0.self_attn", "self"),
            ("transformer_blocks.0.cross_attn", "cross"),
        ),
    ),
    "mochi": Family(
        diffusers.MochiTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 6,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "max_sequence_length": TEXT,
        },
        lambda: {
            "hidden_states": torch.randn(BATCH, 4, 1, 4, 8),
            "encoder_hidden_states": _text(16),
            "timestep": _steps(),
            "encoder_attention_mask": _padding(),
        },
        (
            ("transformer_blocks.0.attn1", "joint"),
            ("transformer_blocks.1.attn1", "joint"),
        ),
    ),
    "wan-animate-2": Family(
        diffusers.WanAnimate2Transformer3DModel,
        {
            "patch_size": (1, 2, 2),
            "text_len": TEXT,
            "in_dim": 8,
            "dim": 48,
            "ffn_dim": 16,
            "freq_dim": 8,
            "text_dim": 6,
            "out_dim": 4,
            "num_heads": 3,
            "num_layers": 1,
            "use_img_emb": True,
        },
        lambda: {
            "hidden_states": [torch.randn(4, 2, 4, 4)],
            "timestep": torch.tensor([1.0]),
            "encoder_hidden_states": [torch.randn(TEXT, 6)],
            "condition_latents": [torch.randn(4, 2, 4, 4)],
            "encoder_hidden_states_image": torch.randn(1, 3, 1280),
            "kv_cache": WanAnimate2KVCache(1),
            "kv_cache_mode": "extract",
            "seq_len": 8,
            "offset_grid_sizes": torch.tensor([[2, 2, 2]]),
        },
        (
            ("blocks.0.self_attn", "self"),
            ("blocks.0.cross_attn", "cross"),
            ("blocks.0.cross_attn:image", "cross"),
        ),
    ),
}
