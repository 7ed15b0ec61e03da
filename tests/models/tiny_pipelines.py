"""Tiny random text-to-image pipelines of diffusers, whole: tokenizers, text encoders, VAE, denoiser, scheduler.

No file is read and nothing is downloaded. `PIPELINES` builds each family, `SIZE` is the images' height and width,
and `ARGUMENTS` says what a family's call needs beside the prompt to be quick.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE as flux2_system_message
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn

SIZE = (64, 64)  # 8 × 8 latents; two pipelines take it that a VAE divides sides by 8, so all here do
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
    arguments = {"layers_per_block": 1, "block_out_channels": (4,) * 4, "norm_num_groups": 2, **changes}
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        **arguments,
    ).eval()


_WORDS = re.compile(r"<\|?\w+\|?>|\n|\w+|[^\w\s]")


def llm_tokenizer(*templates: str, chat: str | None = None, side: str = "left", bos: bool = False) -> Any:
    """One token a word of the templates, and one a letter of every other word."""
    words = dict.fromkeys(word for template in templates for word in _WORDS.findall(template))
    letters = dict.fromkeys(string.ascii_letters + string.digits + string.punctuation)
    vocab = [("<pad>", 0.0), ("<eos>", 0.0), ("<bos>", 0.0), ("<unk>", 0.0)]
    vocab += [(token, -1.0) for token in words | letters]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS.pattern), "removed", invert=True)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=[word for word in words if word.startswith("<")],
        padding_side=side,
        chat_template=chat,
    )


def llm(kind: str, vocabulary: int, **changes: Any) -> transformers.PreTrainedModel:
    """A text encoder such as `Gemma2Model`."""
    config = getattr(transformers, f"{kind.removesuffix('Model')}Config")(
        vocab_size=vocabulary,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        **changes,
    )
    return getattr(transformers, kind)(config).eval()


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


def stable_diffusion_xl(heads: int = 4) -> DiffusionPipeline:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(scaling_factor=0.13),
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet(
            heads,
            cross_attention_dim=16,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 8,
        ),
        scheduler=noise_scheduler(),
        add_watermarker=False,
    )


def flux2(heads: int = 4) -> DiffusionPipeline:
    """The tokenizer alone stands for the processor, whose images are not used."""
    template = "{% for m in messages %}{{ m['role'] }} {{ m['content'][0]['text'] }} {% endfor %}"
    tokenizer = llm_tokenizer(flux2_system_message, chat=template, side="right")
    text = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    heads_of_text = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **text, **heads_of_text},
        vision_config={"model_type": "pixtral", **vision, "image_size": 16, "patch_size": 4},
    )
    decoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4,) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
    )
    decoder.bn.running_mean.uniform_(-1, 1)
    decoder.bn.running_var.uniform_(0.5, 4)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=heads,
        attention_head_dim=8,
        joint_attention_dim=16,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
    )
    return diffusers.Flux2Pipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True),
        vae=decoder.eval(),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        transformer=random(transformer),
    )


def sana(heads: int = 4) -> DiffusionPipeline:
    """Its self-attention is linear: `heads` are those of its cross-attention."""
    tokenizer = llm_tokenizer(bos=True)  # padding on the left, which the pipeline turns round
    blocks = {"block_types": ("ResBlock",) * 4, "block_out_channels": (4,) * 4, "layers_per_block": (1,) * 4}
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
    qkv = {"encoder_qkv_multiscales": ((),) * 4, "decoder_qkv_multiscales": ((),) * 4}
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=3,
        attention_head_dim=8,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=24 // heads,
        cross_attention_dim=24,
        caption_channels=8,
        sample_size=32,
        patch_size=1,
    )
    return diffusers.SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=llm("Gemma2Model", len(tokenizer)),
        vae=diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.41, **sides, **qkv).eval(),
        transformer=random(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def qwen_image(heads: int = 4) -> DiffusionPipeline:
    tokenizer = llm_tokenizer(QWEN_TEMPLATE, side="right")
    text = {"vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **text,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": rope,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 8,
            "fullatt_block_indexes": [0],
        },
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        num_attention_heads=heads,
        attention_head_dim=8,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.QwenImagePipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        vae=video_vae(diffusers.AutoencoderKLQwenImage),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(),
        tokenizer=tokenizer,
        transformer=random(transformer),
    )


def video_vae(kind: Any) -> ModelMixin:
    return kind(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[0.5, 1.5, 2.0, 3.0],
    ).eval()


def lumina2(heads: int = 4) -> DiffusionPipeline:
    tokenizer = llm_tokenizer(LUMINA_TEMPLATE, bos=True)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=8 * heads,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=heads,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 16, 16),
        cap_feat_dim=8,
    )
    return diffusers.Lumina2Pipeline(
        transformer=random(transformer),
        scheduler=flow_scheduler(shift=6.0),
        vae=vae(scaling_factor=0.36, shift_factor=0.11),
        text_encoder=llm("Gemma2Model", len(tokenizer)),
        tokenizer=tokenizer,
    )


def aura_flow(heads: int = 4) -> DiffusionPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        num_attention_heads=heads,
        attention_head_dim=8,
        joint_attention_dim=8,
        caption_projection_dim=8 * heads,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(kind="UMT5"),
        vae=vae(scaling_factor=0.13),
        transformer=random(transformer),
        scheduler=flow_scheduler(shift=1.73),
    )


def bert_tokenizer() -> transformers.BertTokenizer:
    """One token a letter."""
    letters = [start + letter for letter in string.ascii_lowercase + string.digits for start in ("", "##")]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    return transformers.BertTokenizer(
        {token: index for index, token in enumerate(tokens)}, model_max_length=77
    )


def hunyuan_dit(heads: int = 4) -> DiffusionPipeline:
    bert = transformers.BertConfig(
        vocab_size=len(bert_tokenizer()),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
    )
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=heads,
        attention_head_dim=8,
        hidden_size=8 * heads,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        num_layers=2,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
    )
    return diffusers.HunyuanDiTPipeline(
        vae=vae(scaling_factor=0.13),
        text_encoder=transformers.BertModel(bert).eval(),
        tokenizer=bert_tokenizer(),
        transformer=random(transformer),
        scheduler=diffusers.DDPMScheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


def cogview4(heads: int = 4) -> DiffusionPipeline:
    tokenizer = llm_tokenizer(bos=True)
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=heads,
        attention_head_dim=8,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=llm("GlmModel", len(tokenizer)),
        vae=vae(scaling_factor=1.0),
        transformer=random(transformer),
        scheduler=flow_scheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
    )


def chroma(heads: int = 4) -> DiffusionPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=heads,
        attention_head_dim=8,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )
    return diffusers.ChromaPipeline(
        scheduler=flow_scheduler(),
        vae=vae(scaling_factor=0.36, shift_factor=0.11),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=random(transformer),
    )


def z_image(heads: int = 4) -> DiffusionPipeline:
    chat = "<|im_start|>{{ messages[0]['content'] }}<|im_end|>"
    tokenizer = llm_tokenizer("<|im_start|><|im_end|>", chat=chat)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=8 * heads,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=8,
        axes_dims=[2, 2, 4],
        axes_lens=[256, 16, 16],
    )
    return diffusers.ZImagePipeline(
        scheduler=flow_scheduler(shift=3.0),
        vae=vae(scaling_factor=0.36, shift_factor=0.11),
        text_encoder=llm("Qwen3Model", len(tokenizer)),
        tokenizer=tokenizer,
        transformer=random(transformer),
    )


def ovis(heads: int = 4) -> DiffusionPipeline:
    chat = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    tokenizer = llm_tokenizer("<|im_start|><|im_end|>", chat=chat, side="right")
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=heads,
        attention_head_dim=8,
        joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.OvisImagePipeline(
        scheduler=flow_scheduler(shift=3.0),
        vae=vae(scaling_factor=0.36, shift_factor=0.11),
        text_encoder=llm("Qwen3Model", len(tokenizer)),
        tokenizer=tokenizer,
        transformer=random(transformer),
    )


def wan(heads: int = 4) -> DiffusionPipeline:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=16,
    )
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(kind="UMT5"),
        vae=video_vae(diffusers.AutoencoderKLWan),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=random(transformer),
    )


QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
)  # 34 words before the prompt, as with the tokenizer that the pipeline is made for
LUMINA_TEMPLATE = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment "
    "based on textual prompts or user prompts. <Prompt Start> "
)


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
        "sdxl": stable_diffusion_xl,
        "pixart-alpha": pixart_alpha,
        "pixart-sigma": pixart_sigma,
        "sd3": stable_diffusion_3,
        "sd3.5": stable_diffusion_35,
        "flux-dev": flux,
        "flux-schnell": flux_schnell,
        "flux2": flux2,
        "sana": sana,
        "qwen-image": qwen_image,
        "lumina2": lumina2,
        "auraflow": aura_flow,
        "hunyuan-dit": hunyuan_dit,
        "cogview4": cogview4,
        "chroma": chroma,
        "z-image": z_image,
        "ovis": ovis,
        "wan": wan,
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
    "flux2": {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2)},
    "sana": {
        "use_resolution_binning": False,
        "max_sequence_length": TEXT,
        "complex_human_instruction": ["Enhance this:"],
    },
    "lumina2": {"max_sequence_length": 48},
    "auraflow": {"max_sequence_length": TEXT},
    "hunyuan-dit": {"use_resolution_binning": False},
    "chroma": {"max_sequence_length": TEXT},
    "z-image": {"max_sequence_length": 64},
    "wan": {"max_sequence_length": TEXT, "num_frames": 5},
}
"""Further arguments of a family's call."""
