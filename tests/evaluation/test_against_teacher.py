"""Student against teacher at equal noise: by diffusers' and the project's pipelines, and by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torchvision
import transformers
from commands import command, sets
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from small_models import small_dit
from tiny_clip import TOKENS, tokenizer
from torch import Tensor, nn
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from shd_diffusion.config import SampleConfig
from shd_diffusion.evaluation import compare_metrics, load_extractor
from shd_diffusion.evaluation import lpips as lpips_module
from shd_diffusion.evaluation.against_teacher import (
    Calls,
    against_teacher,
    generate,
    paired_difference,
    summarise,
)
from shd_diffusion.evaluation.against_teacher_run import chosen_images, with_denoiser_of
from shd_diffusion.evaluation.extractors import Extractor
from shd_diffusion.evaluation.lpips import LPIPS, lpips_is_missing
from shd_diffusion.randomness import generator
from shd_diffusion.sampling import ClassConditionalPipeline
from shd_diffusion.sampling.generate import Summary, call_arguments, sample_images

PROMPTS = ["a red heart", "b", "the sea at night"]
ARGUMENTS = {"num_inference_steps": 3, "guidance_scale": 3.0, "eta": 1.0, "height": 16, "width": 16}


def _random(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter random: as initialised, many models predict nothing."""
    numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=numbers)
    return model.eval()


def _unet(heads: int, seed: int) -> nn.Module:
    return _random(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=heads,
        ),
        seed,
    )


@pytest.fixture(scope="module")
def pipelines() -> tuple[StableDiffusionPipeline, StableDiffusionPipeline]:
    """A student and a teacher of Stable Diffusion's kind, each with a scheduler of its own that draws noise."""
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer()), hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4,
    )  # fmt: skip
    encoder = _random(transformers.CLIPTextModel(text), 2)
    return tuple(
        StableDiffusionPipeline(
            vae=_random(vae, 3),
            text_encoder=encoder,
            tokenizer=tokenizer(),
            unet=_unet(heads, seed),
            scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        for heads, seed in ((1, 0), (2, 1))
    )


@pytest.fixture(scope="module")
def extractor(clip_folder: Path) -> Extractor:
    return load_extractor("clip", clip_model=str(clip_folder))


def test_latents_and_images_are_the_pipelines_own(pipelines) -> None:
    """One sampling gives what two calls of the pipeline do, from generators by (seed, index)."""
    calls = Calls([4, 0, 7], {"prompt": PROMPTS}, seed=5, arguments=ARGUMENTS)
    latents, images = generate(pipelines[0], calls, [0, 2])
    for kind, found in (("latent", latents), ("pt", images)):
        generators = [generator(5, "sample", index) for index in (4, 7)]
        (expected, _) = pipelines[0](
            [PROMPTS[0], PROMPTS[2]], generator=generators, output_type=kind, return_dict=False, **ARGUMENTS
        )
        expected = expected if kind == "latent" else (expected * 255).round().to(torch.uint8)
        assert expected.float().std() > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if kind == "latent" else 1)


def test_measures_are_their_definitions(pipelines, extractor: Extractor) -> None:
    student, teacher = pipelines
    calls = Calls([4, 0, 7], {"prompt": PROMPTS}, seed=5, arguments=ARGUMENTS, pass_size=2)
    found = against_teacher(student, teacher, calls, extractor)
    assert found.keys() == {"latent_mse", "latent_relative_mse", "feature_cosine"}
    for place in range(3):
        alone = [generate(pipeline, calls, [place]) for pipeline in (student, teacher)]
        ours, theirs = (latents.double().numpy() for latents, _ in alone)
        error = np.mean((ours - theirs) ** 2)
        features = [extractor(images).double().numpy()[0] for _, images in alone]
        cosine = (
            features[0] @ features[1] / np.sqrt((features[0] @ features[0]) * (features[1] @ features[1]))
        )
        expected = {
            "latent_mse": error,
            "latent_relative_mse": error / np.mean(theirs**2),
            "feature_cosine": cosine,
        }
        for name, value in expected.items():  # in a batch of two, rounded otherwise
            assert found[name][place] == pytest.approx(float(value), rel=1e-3), name
        assert error > 1e-3 and cosine < 1


def test_a_student_equals_itself(pipelines, extractor: Extractor) -> None:
    calls = Calls([0, 1, 2], {"prompt": PROMPTS}, arguments=ARGUMENTS, pass_size=3)
    found = against_teacher(pipelines[1], pipelines[1], calls, extractor)
    assert found["latent_mse"] == found["latent_relative_mse"] == [0.0] * 3
    assert found["feature_cosine"] == pytest.approx([1.0] * 3, abs=1e-6)
    summary = summarise(found)
    assert (summary["latent_mse"].low, summary["latent_mse"].high, summary["latent_mse"].n) == (0, 0, 3)


def test_other_denoisers_share_the_rest(pipelines, tmp_path: Path) -> None:
    student, teacher = pipelines
    teacher.unet.save_pretrained(tmp_path)
    exchanged = with_denoiser_of(student, str(tmp_path))
    assert exchanged.unet is not student.unet and exchanged.vae is student.vae
    assert student.unet.config.attention_head_dim == 1 and exchanged.unet.config.attention_head_dim == 2
    calls = Calls([1], {"prompt": PROMPTS[:1]}, arguments=ARGUMENTS)
    torch.testing.assert_close(
        generate(exchanged, calls, [0])[0], generate(teacher, calls, [0])[0], rtol=0, atol=0
    )


def test_classes_start_from_the_noise_of_sample(extractor: Extractor) -> None:
    """The student's side of a pair is the image that `sample` writes."""
    pipeline = ClassConditionalPipeline(
        _random(small_dit(2, layers=1), 0), DDPMScheduler(num_train_timesteps=50, clip_sample=False)
    )
    pipeline.set_progress_bar_config(disable=True)
    config = SampleConfig(num_inference_steps=3, seed=7, guidance_scale=2.0)
    calls = Calls(range(4), {"class_labels": [0, 1, 2, 3]}, 7, call_arguments(config), pass_size=4)
    latents, images = generate(pipeline, calls, range(4))
    expected = sample_images(pipeline, range(4), config)
    assert latents.shape == (4, 1, 8, 8)
    torch.testing.assert_close(latents.clamp(-1, 1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(images.float() / 127.5 - 1, expected.expand(-1, 3, -1, -1), rtol=0, atol=1e-2)
    teacher = ClassConditionalPipeline(_random(small_dit(4, layers=1), 1), pipeline.scheduler)
    found = against_teacher(pipeline, teacher, calls, extractor)
    assert min(found["latent_mse"]) > 1e-3


def test_models_without_a_condition_and_pipelines_of_other_classes(pipelines, extractor: Extractor) -> None:
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
    )  # fmt: skip
    pipeline = ClassConditionalPipeline(_random(unet, 0), DDPMScheduler(num_train_timesteps=50))
    calls = Calls([2, 3], {}, arguments={"num_inference_steps": 2}, pass_size=2)
    assert against_teacher(pipeline, pipeline, calls, extractor)["latent_mse"] == [0.0, 0.0]
    with pytest.raises(ValueError, match="a DDPMPipeline and a StableDiffusionPipeline do not compare"):
        against_teacher(DDPMPipeline(unet, DDPMScheduler()), pipelines[0], calls, extractor)


def test_pairs_tell_apart_what_lies_within_the_spread() -> None:
    """Two students of widely spread errors, of which the second is 0.1 better on each image."""
    first = {"latent_mse": [1.0, 5.0, 2.0, 9.0, 4.0], "lpips": [1.0] * 5}
    second = {"latent_mse": [value - 0.1 for value in first["latent_mse"]]}
    alone, difference = summarise(first)["latent_mse"], paired_difference(first, second)
    assert difference.keys() == {"latent_mse"}
    assert difference["latent_mse"].mean == pytest.approx(-0.1)
    assert difference["latent_mse"].high < 0 < alone.low < 4.2 < alone.high
    with pytest.raises(ValueError, match="shorter"):
        paired_difference(first, {"latent_mse": [1.0]})


def test_the_first_image_of_each_prompt_is_chosen() -> None:
    sampled = Summary(num_images=6, prompts=["a", "a", "b", "a", "c", "c"])
    assert chosen_images(sampled, 2) == [0, 2] and chosen_images(sampled, 9) == [0, 2, 4]
    assert chosen_images(Summary(num_images=6, labels=[0] * 6), 4) == [0, 1, 2, 3]


# --- LPIPS ------------------------------------------------------------------------------------------------------


@pytest.fixture
def squeezenet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> nn.Sequential:
    """LPIPS on the smallest of its networks, with random weights where torchvision keeps its own."""
    url = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(lpips_module, "NET", "squeeze")
    monkeypatch.setattr(lpips_module, "URL", url)
    assert "weights are not on this machine; fetch https://" in str(lpips_is_missing(32, 32))
    network = torchvision.models.squeezenet1_1()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), lpips_module.weights_file())
    return network.features


def _lpips(features: nn.Sequential, heads: list[Tensor], first: Tensor, second: Tensor) -> float:
    """Equation 1 of the paper on two images (3, H, W) in [0, 1], at SqueezeNet's seven layers."""
    mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    sides = [((2 * side - 1) - mean[:, None, None]) / deviation[:, None, None] for side in (first, second)]
    distance, taken = 0.0, 0
    for place, layer in enumerate(features.double()):
        sides = [layer(side[None])[0] for side in (side.double() for side in sides)]
        if place in (1, 4, 7, 9, 10, 11, 12):
            unit = [side / side.norm(dim=0, keepdim=True).clamp(min=1e-10) for side in sides]
            weights = heads[taken].double().flatten()
            distance += float(((unit[0] - unit[1]) ** 2 * weights[:, None, None]).sum(dim=0).mean())
            taken += 1
    return distance


def test_lpips_is_its_definition_and_that_of_torchmetrics(squeezenet: nn.Sequential, photographs) -> None:
    assert lpips_is_missing(32, 32) is None
    first, second = photographs[0][:3], photographs[1][:3]
    lpips = LPIPS()
    found = lpips(first, second)
    heads = [layer.model[-1].weight for layer in lpips.net.lins]
    with torch.no_grad():
        expected = [_lpips(squeezenet, heads, x / 255, y / 255) for x, y in zip(first, second, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-3) and min(expected) > 1e-4
    pair = learned_perceptual_image_patch_similarity(
        first / 255, second / 255, "squeeze", "none", normalize=True
    )
    torch.testing.assert_close(found, pair)
    assert lpips(first[:1], first[:1]).tolist() == [0.0] and len(lpips.protocol()["sha256"]) == 64


def test_lpips_is_left_out_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "alexnet-owt-7be5be79.pth" in str(lpips_is_missing(64, 64))
    assert "images of 8×64 are too small" in str(lpips_is_missing(64, 8))


# --- the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def student(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "kd-shd", tmp_path / "student"))


def test_a_run_is_compared_with_its_teacher(student: Path, runs: Path, tmp_path: Path) -> None:
    code, printed, errors = command("evaluate", student, *sets("evaluate.against_teacher=6"))
    assert code == 0, errors
    metrics = json.loads(printed)
    found = metrics["against_teacher"]
    assert found["indices"] == list(range(6)) and len(found["per_image"]["latent_mse"]) == 6
    for name in ("latent_mse", "latent_relative_mse", "feature_cosine"):
        assert found[name]["n"] == 6 and found[name]["low"] < found[name]["mean"] < found[name]["high"]
    assert found["notes"] == ["LPIPS is left out: images of 8×8 are too small; it takes 32 pixels or more"]
    assert found["protocol"]["arguments"]["num_inference_steps"] == 3  # as the samples were made
    without = json.loads((runs / "kd-shd" / "evaluation" / "metrics.json").read_text())
    assert {key: metrics[key] for key in without} == without
    assert json.loads((student / "evaluation" / "metrics.json").read_text()) == metrics

    # a teacher in the student's place is no distance away from itself
    shutil.rmtree(student / "pipeline" / "denoiser")
    shutil.copytree(runs / "teacher" / "pipeline" / "denoiser", student / "pipeline" / "denoiser")
    itself = json.loads(command("evaluate", student, *sets("evaluate.against_teacher=6"))[1])
    assert itself["against_teacher"]["per_image"]["latent_mse"] == [0.0] * 6
    compared = compare_metrics(metrics, itself)
    assert compared["against_teacher.latent_mse"]["high"] < 0
    assert compared["against_teacher.latent_mse"]["difference"] == pytest.approx(-found["latent_mse"]["mean"])
    other = itself | {"against_teacher": itself["against_teacher"] | {"protocol": {"seed": 1}}}
    assert "against_teacher.latent_mse" not in compare_metrics(metrics, other)


@pytest.mark.parametrize(
    ("target", "number", "says"),
    [
        ("teacher", 2, "config.yaml: key `evaluate.against_teacher`: this run has no teacher"),
        ("kd-shd", 25, "key `evaluate.against_teacher` is 25, but"),
        ("kd-shd/pipeline", 2, "is no run of `distill`, so `evaluate.against_teacher` must be 0"),
        ("kd-shd/samples", 2, "is no run of `distill`, so `evaluate.against_teacher` must be 0"),
    ],
)
def test_what_has_no_teacher_is_one_line(target: str, number: int, says: str, runs: Path) -> None:
    before = (runs / "kd-shd" / "evaluation" / "metrics.json").read_bytes()
    code, _, errors = command("evaluate", runs / target, *sets(f"evaluate.against_teacher={number}"))
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and says in message[0], errors
    assert (runs / "kd-shd" / "evaluation" / "metrics.json").read_bytes() == before
