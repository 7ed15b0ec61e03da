"""The pipeline and sampling by index."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from PIL import Image

from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError
from shd_diffusion.models.adapter import null_label
from shd_diffusion.sampling import ClassConditionalPipeline, generate, make_scheduler, sample_indices


def tiny_pipeline(scheduler: str = "DDIMScheduler") -> ClassConditionalPipeline:
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        in_channels=1,
        out_channels=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # adaLN-zero would predict exactly nothing
            parameter.normal_(std=0.2)
    pipeline = ClassConditionalPipeline(
        model, make_scheduler(scheduler, {}, DDPMScheduler(clip_sample=False))
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CONFIG = SampleConfig(num_images=7, num_inference_steps=4, batch_size=3)


def test_saved_pipeline_gives_the_same_images(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(sample_indices(pipeline, range(4), CONFIG), sample_indices(loaded, range(4), CONFIG))


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_an_image_depends_on_its_index_alone(scheduler: str) -> None:
    pipeline = tiny_pipeline(scheduler)
    together = sample_indices(pipeline, [0, 1, 2, 3], CONFIG)
    torch.testing.assert_close(sample_indices(pipeline, [3, 1], CONFIG), together[[3, 1]])
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_guidance_is_a_line_through_both_predictions() -> None:
    pipeline = tiny_pipeline()
    model, null = pipeline.denoiser, null_label(pipeline.denoiser)
    latents, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    steps = torch.tensor(500)
    with torch.no_grad():
        conditional = model(latents, timestep=steps.expand(2), class_labels=labels).sample
        unconditional = model(latents, timestep=steps.expand(2), class_labels=torch.full((2,), null)).sample
        guided = pipeline._predict(latents, steps, labels, null, 3.0, None)
        unguided = pipeline._predict(latents, steps, labels, null, 1.0, None)
    torch.testing.assert_close(guided, 3 * conditional - 2 * unconditional)
    torch.testing.assert_close(unguided, conditional)
    assert (conditional - unconditional).abs().max() > 1e-3


def test_generate_continues_and_repeats_nothing(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = generate(pipeline, CONFIG, whole, {}, "test")
    generate(pipeline, CONFIG.model_copy(update={"num_images": 3}), parts, {}, "test")
    generate(pipeline, CONFIG, parts, {}, "test")
    assert summary["num_images"] == 7 and summary["labels"] == [0, 1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in whole.glob("*.png")) == [f"{i:06d}.png" for i in range(7)]
    assert all((parts / p.name).read_bytes() == p.read_bytes() for p in whole.glob("*.png"))
    assert Image.open(whole / "000000.png").size == (8, 8)


def test_samples_of_another_protocol_are_not_mixed(tmp_path: Path) -> None:
    generate(tiny_pipeline(), CONFIG, tmp_path, {}, "test")
    with pytest.raises(UserError, match=r"sampling\.json.*`guidance_scale`"):
        generate(tiny_pipeline(), CONFIG.model_copy(update={"guidance_scale": 2.0}), tmp_path, {}, "test")


def test_bad_requests_are_refused() -> None:
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match="0 to 9"):
        pipeline([10])
    with pytest.raises(ValueError, match="latents have shape"):
        pipeline([1], latents=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="no scheduler class"):
        make_scheduler("NoScheduler", {}, DDPMScheduler())
    with pytest.raises(ValueError, match="no argument `etta`"):
        make_scheduler("DDIMScheduler", {"etta": 1}, DDPMScheduler())
