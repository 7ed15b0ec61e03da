"""The pipeline's images against loops that are written out, in float64: no rounding of a batch or a CPU shows there."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from small_models import small_dit
from torch import Tensor, nn

from shd_diffusion.sampling import ClassConditionalPipeline, make_scheduler

# So few and small betas that no division by a tiny signal saturates the images of a random model.
TRAINED = DDPMScheduler(num_train_timesteps=50, clip_sample=False)


def random_weights(model: nn.Module, std: float = 0.2) -> nn.Module:
    """A model in float64 that predicts something: adaLN-zero would predict exactly nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std, generator=generator)
    return model.double().eval()


def unet(num_class_embeds: int | None = None) -> nn.Module:
    """A UNet of any image size."""
    return random_weights(
        UNet2DModel(
            in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4, num_class_embeds=num_class_embeds,
        ),
        std=0.1,
    )  # fmt: skip


def pipeline_of(
    model: nn.Module, scheduler: str, trained_with: object = TRAINED, **options: object
) -> ClassConditionalPipeline:
    pipeline = ClassConditionalPipeline(model, make_scheduler(scheduler, {}, trained_with), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: ClassConditionalPipeline, *labels: object, **options: object) -> Tensor:
    return pipeline(*labels, output_type="pt", return_dict=False, **options)[0]


def as_images(latents: Tensor) -> Tensor:
    return (latents.float() / 2 + 0.5).clamp(0, 1)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_same_images(found: Tensor, expected: Tensor) -> None:
    """Images are float32 in [0, 1]; diffusers keeps its tables and a flow's steps in float32, 6e-8 relative each."""
    inside = (expected > 0) & (expected < 1)
    assert (
        inside.double().mean() > 0.3 and expected[inside].std() > 0.1
    )  # more than white and black is compared
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.no_grad()
def test_ddim_with_guidance_is_the_loop_of_its_paper(scale: float) -> None:
    model, labels = random_weights(small_dit(2, layers=1)), torch.tensor([3, 0, 9])
    pipeline = pipeline_of(model, "DDIMScheduler")
    betas = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)  # ᾱ
    x = noise(3, 1, 8, 8)
    found = call(pipeline, labels.tolist(), num_inference_steps=5, guidance_scale=scale, latents=x)
    for t in (40, 30, 20, 10, 0):
        step = torch.full((3,), t)
        conditional = model(x, timestep=step, class_labels=labels).sample
        unconditional = model(x, timestep=step, class_labels=torch.full((3,), 10)).sample
        assert (conditional - unconditional).abs().max() > 1e-2
        epsilon = unconditional + scale * (conditional - unconditional)
        before = signal[t - 10] if t else torch.tensor(1.0)
        clean = (x - (1 - signal[t]).sqrt() * epsilon) / signal[t].sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * epsilon  # Song et al. 2021, equation 12, σ = 0
    assert_same_images(found, as_images(x))


@torch.no_grad()
def test_euler_of_an_unconditional_flow_is_its_loop() -> None:
    """No condition, images that are not square, timesteps σ·T of a shifted schedule."""
    model = unet()
    trained = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    pipeline = pipeline_of(model, "FlowMatchEulerDiscreteScheduler", trained, sample_shape=[1, 8, 16])
    x = noise(2, 1, 8, 16)
    found = call(pipeline, num_images=2, num_inference_steps=4, guidance_scale=2.0, latents=x)
    shares = torch.linspace(
        1, 3 * 0.001 / (1 + 2 * 0.001), 4, dtype=torch.float64
    )  # diffusers' σ_max to σ_min
    sigmas = torch.cat([3 * shares / (1 + 2 * shares), torch.zeros(1)])
    for sigma, following in pairwise(sigmas):
        x = x + (following - sigma) * model(x, (sigma * 1000).expand(2)).sample
    assert_same_images(found, as_images(x))


@torch.no_grad()
def test_guidance_ends_outside_of_its_interval() -> None:
    model, x = random_weights(small_dit(2, layers=1)), noise(2, 1, 8, 8)
    pipeline = pipeline_of(model, "DDIMScheduler")
    options = {"num_inference_steps": 5, "latents": x}
    plain = call(pipeline, [1, 2], **options)
    guided = call(pipeline, [1, 2], guidance_scale=3.0, **options)
    nowhere = call(pipeline, [1, 2], guidance_scale=3.0, guidance_interval=[41, 50], **options)
    everywhere = call(pipeline, [1, 2], guidance_scale=3.0, guidance_interval=[0, 40], **options)
    assert torch.equal(nowhere, plain) and torch.equal(everywhere, guided) and not torch.equal(plain, guided)


def test_without_labels_a_conditional_model_has_its_null_condition() -> None:
    pipeline = pipeline_of(unet(num_class_embeds=11), "DDIMScheduler", sample_shape=[1, 8, 8])
    x = noise(2, 1, 8, 8)
    null = call(pipeline, num_images=2, num_inference_steps=3, latents=x)
    labelled = call(pipeline, [4, 4], num_inference_steps=3, guidance_scale=0.0, latents=x)
    torch.testing.assert_close(
        null, labelled, rtol=0, atol=1e-6
    )  # ε_uncond + 0 · (…), of twice as large a batch
    assert (null - call(pipeline, [4, 4], num_inference_steps=3, latents=x)).abs().max() > 1e-4


@pytest.mark.parametrize("sample_shape", [None, [1, 8, 16]])
def test_a_saved_pipeline_gives_the_same_images(sample_shape: list[int] | None, tmp_path: Path) -> None:
    model = small_dit(2, layers=1) if sample_shape is None else unet()
    pipeline = pipeline_of(random_weights(model), "DDIMScheduler", sample_shape=sample_shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipeline.save_pretrained(tmp_path)
        loaded = ClassConditionalPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.noise_shape == pipeline.noise_shape == tuple(sample_shape or (1, 8, 8))
    assert loaded.config["sample_shape"] == sample_shape
    options = {"num_inference_steps": 3, "latents": noise(1, *loaded.noise_shape)}
    labels = [[7]] if sample_shape is None else []
    # not equal to the last bit: loaded weights lie elsewhere in memory, and products are summed by its alignment
    torch.testing.assert_close(call(pipeline, *labels, **options), call(loaded, *labels, **options))


def test_bad_requests_are_refused() -> None:
    pipeline = pipeline_of(small_dit(2, layers=1), "DDIMScheduler")
    with pytest.raises(ValueError, match="0 to 9"):
        pipeline([10])
    with pytest.raises(ValueError, match="latents have shape"):
        pipeline([1], latents=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="UNet2DModel takes no class labels"):
        pipeline_of(unet(), "DDIMScheduler", sample_shape=[1, 8, 8])([1])
    with pytest.raises(ValueError, match="UNet2DModel names no size; give the pipeline its `sample_shape`"):
        pipeline_of(unet(), "DDIMScheduler")()
