"""Pipelines whose denoiser would be called otherwise here than they call it are refused before prompts are encoded."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from test_prompts import as_latents
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE, TEXT, flow_scheduler, llm_tokenizer, random, unet, vae
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from shd_diffusion.errors import UserError
from shd_diffusion.models import families
from shd_diffusion.models.convention import check_convention
from shd_diffusion.models.families import FAMILIES
from shd_diffusion.models.prompts import PromptEncoder, first_step


def encoder_of(name: str) -> tuple[PromptEncoder, tuple[int, ...]]:
    """Of a pipeline, with the shape of its latents."""
    pipeline = PIPELINES[name]()
    encoder = PromptEncoder(pipeline, SIZE, ARGUMENTS.get(name, {}))
    step = first_step(pipeline, ["a"], **encoder.call(**encoder.without_guidance))
    return encoder, tuple(as_latents(pipeline, step.told[2]).shape[1:])


@pytest.mark.parametrize("name", PIPELINES)
def test_known_classes_pass(name: str) -> None:
    encoder, shape = encoder_of(name)
    model = getattr(encoder.pipeline, encoder._denoiser)
    forward = model.forward
    check_convention(encoder, shape)
    assert model.forward == forward


@pytest.mark.parametrize("name", ["flux-dev", "sana", "lumina2", "qwen-image", "auraflow", "z-image"])
def test_a_class_that_is_not_known_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, shape = encoder_of(name)
    kind = type(getattr(encoder.pipeline, encoder._denoiser)).__name__
    if name == "sana":
        monkeypatch.setitem(FAMILIES, kind, families.Family(timesteps=lambda _, timesteps: timesteps / 1000))
    else:
        monkeypatch.delitem(FAMILIES, kind)
    with pytest.raises(UserError, match=rf"^{kind}(: \w+ tells it (a timestep of|`)| is not called here as)"):
        check_convention(encoder, shape)


def test_a_sign_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, shape = encoder_of("lumina2")
    known = FAMILIES["Lumina2Transformer2DModel"]
    monkeypatch.setitem(FAMILIES, "Lumina2Transformer2DModel", replace(known, prediction=lambda found: found))
    with pytest.raises(UserError, match="gives its scheduler another prediction than is learned here"):
        check_convention(encoder, shape)


def test_a_denoiser_that_cannot_be_traced_is_refused_before_prompts_are_encoded() -> None:
    encoder, shape = encoder_of("sd3")
    encoder.pipeline.transformer.register_to_config(in_channels=5)  # what training would build it from
    with pytest.raises(UserError, match=r"^SD3Transformer2DModel takes no samples .* not known here"):
        check_convention(encoder, shape)


def test_a_latent_consistency_model_is_refused() -> None:
    pipeline = PIPELINES["sd1.5"]()
    pipeline.register_modules(unet=unet(4, time_cond_proj_dim=8))
    with pytest.raises(
        UserError, match=r"^UNet2DConditionModel is told its guidance scale as `timestep_cond`"
    ):
        check_convention(PromptEncoder(pipeline, SIZE, {}), (4, 8, 8))


def prx() -> DiffusionPipeline:
    tokenizer = llm_tokenizer(bos=True, side="right")
    tokenizer.model_max_length = TEXT
    half = {
        "vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4,
    }  # fmt: skip
    config = transformers.T5GemmaConfig(encoder=half, decoder=half, vocab_size=len(tokenizer))
    transformer = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=8, hidden_size=32, mlp_ratio=2.0, num_heads=4, depth=1,
        axes_dim=[4, 4],
    )  # fmt: skip
    encoder = T5GemmaEncoder(config.encoder)
    return diffusers.PRXPipeline(
        transformer=random(transformer),
        scheduler=flow_scheduler(shift=3.0),
        text_encoder=encoder.eval(),
        tokenizer=tokenizer,
        vae=vae(scaling_factor=0.36, shift_factor=0.11),
        default_sample_size=SIZE[0],
    )


def test_a_thousandth_of_a_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    """PRX' own unit, found by this check."""
    cleaned = SimpleNamespace(
        fix_text=lambda text: text
    )  # of a package that cleans prompts, and may be missing
    monkeypatch.setattr("diffusers.pipelines.prx.pipeline_prx.ftfy", cleaned, raising=False)
    torch.manual_seed(0)
    check_convention(PromptEncoder(prx(), SIZE), (4, SIZE[0] // 8, SIZE[1] // 8))
