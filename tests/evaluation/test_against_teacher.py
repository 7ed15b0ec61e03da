"""Student against teacher at equal noise: by diffusers' and the project's pipelines, and by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
import yaml
from commands import command, sets
from diffusers import DDIMScheduler, DDPMScheduler
from safetensors.torch import load_file, save_file
from small_models import small_dit
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE
from torch import Tensor, nn
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from shd_diffusion.config import SampleConfig
from shd_diffusion.evaluation import compare_metrics, load_extractor
from shd_diffusion.evaluation import lpips as lpips_module
from shd_diffusion.evaluation.against_teacher import against_teacher, generate, summarise
from shd_diffusion.evaluation.against_teacher_run import _sampling_of, chosen_images, with_denoiser_of
from shd_diffusion.evaluation.compare import paired_difference
from shd_diffusion.evaluation.extractors import Extractor
from shd_diffusion.evaluation.lpips import LPIPS, lpips_is_missing
from shd_diffusion.randomness import generator
from shd_diffusion.sample_folder import Summary
from shd_diffusion.sampling import ClassConditionalPipeline
from shd_diffusion.sampling.by_class import ByClass, sample_images
from shd_diffusion.sampling.by_prompt import ByPrompt
from shd_diffusion.sampling.schedulers import own_scheduler

PROMPTS = ["a red heart", "b", "the sea at night"]
INDICES = [4, 0, 8]  # of the second, first and third prompt
CONFIG = SampleConfig(seed=5, num_inference_steps=3, guidance_scale=3.0)


def _by_prompt(family: str, heads: int, seed: int) -> ByPrompt:
    config = CONFIG.model_copy(update={"pipeline_arguments": ARGUMENTS.get(family, {})})
    return ByPrompt(PIPELINES[family](heads, seed), config, PROMPTS, SIZE)


def _by_class(heads: int, seed: int) -> ByClass:
    """Of a DiT whose parameters are all random: adaLN-zero would predict exactly nothing."""
    model, numbers = small_dit(heads, layers=1).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=numbers)
    scheduler = DDPMScheduler(num_train_timesteps=50, clip_sample=False)
    return ByClass(ClassConditionalPipeline(model, scheduler), CONFIG)


@pytest.fixture(scope="module")
def pair() -> tuple[ByPrompt, ByPrompt]:
    """A student and a teacher of Stable Diffusion's kind that differ in all their weights."""
    return _by_prompt("sd1.5", 2, 0), _by_prompt("sd1.5", 4, 1)


@pytest.fixture(scope="module")
def extractor(clip_folder: Path) -> Extractor:
    return load_extractor("clip", clip_model=str(clip_folder))


@pytest.mark.parametrize("family", ["sd1.5", "pixart-sigma", "sd3", "flux-dev"])
def test_latents_and_images_are_the_pipelines_own(family: str) -> None:
    """One sampling gives what a call for latents does, from generators by (seed, index), and the images of `sample`."""
    sampler = _by_prompt(family, 2, 0)
    latents, images = generate(sampler, INDICES[:2])
    (expected, *_) = sampler.pipeline(
        prompt=[PROMPTS[1], PROMPTS[0]],
        generator=[generator(5, "sample", index) for index in INDICES[:2]],
        num_inference_steps=3,
        guidance_scale=3.0,
        height=SIZE[0],
        width=SIZE[1],
        output_type="latent",
        return_dict=False,
        **ARGUMENTS.get(family, {}),
    )
    assert expected.std() > 0.1
    torch.testing.assert_close(latents, expected, rtol=0, atol=0)
    torch.testing.assert_close(images, sampler.images(INDICES[:2]), rtol=0, atol=0)


def test_measures_are_their_definitions(pair, extractor: Extractor) -> None:
    found = against_teacher(*pair, INDICES, extractor, pass_size=2)
    assert found.keys() == {"latent_mse", "latent_relative_mse", "feature_cosine"}
    for place, index in enumerate(INDICES):
        alone = [generate(sampler, [index]) for sampler in pair]
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
            assert found[name][place] == pytest.approx(float(value), rel=1e-2), name
        assert error > 1e-3 and cosine < 1


def test_a_student_equals_itself(pair, extractor: Extractor) -> None:
    found = against_teacher(pair[1], pair[1], INDICES, extractor, pass_size=3)
    assert found["latent_mse"] == found["latent_relative_mse"] == [0.0] * 3
    assert found["feature_cosine"] == pytest.approx([1.0] * 3, abs=1e-6)
    summary = summarise(found)
    assert (summary["latent_mse"].low, summary["latent_mse"].high, summary["latent_mse"].n) == (0, 0, 3)


def test_other_denoisers_share_the_rest(pair, tmp_path: Path) -> None:
    student, teacher = (sampler.pipeline for sampler in pair)
    teacher.unet.save_pretrained(tmp_path)
    exchanged = with_denoiser_of(student, str(tmp_path))
    assert exchanged.unet is not student.unet and exchanged.vae is student.vae
    weights = [pipeline.unet.conv_in.weight for pipeline in (student, exchanged, teacher)]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[2])


def test_classes_start_from_the_noise_of_sample(extractor: Extractor) -> None:
    student, teacher = _by_class(2, 0), _by_class(4, 1)
    latents, images = generate(student, range(4))
    expected = sample_images(student.pipeline, range(4), CONFIG)
    assert latents.shape == (4, 1, 8, 8)
    torch.testing.assert_close(latents.clamp(-1, 1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(images.float() / 127.5 - 1, expected.expand(-1, 3, -1, -1), rtol=0, atol=1e-2)
    assert min(against_teacher(student, teacher, range(4), extractor, pass_size=4)["latent_mse"]) > 1e-3


def test_pipelines_of_other_classes_do_not_compare(pair, extractor: Extractor) -> None:
    with pytest.raises(
        ValueError, match="a ClassConditionalPipeline and a StableDiffusionPipeline do not compare"
    ):
        against_teacher(_by_class(2, 0), pair[0], INDICES, extractor)


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


@pytest.mark.parametrize(("told", "clips"), [({"clip": True}, True), ({}, False)])
def test_the_scheduler_clips_as_it_did_for_the_samples(told: dict[str, Any], clips: bool) -> None:
    sampled = Summary(protocol={"scheduler": "DDIMScheduler", **told})
    for present in (True, False):
        scheduler = own_scheduler(_sampling_of(sampled), DDIMScheduler(clip_sample=present))
        assert scheduler.config["clip_sample"] == clips


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
    assert found["protocol"]["num_inference_steps"] == 3  # as the samples were made
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


def test_another_teacher_than_the_runs_own_is_refused(student: Path, tmp_path: Path) -> None:
    """In the words of `distill`; the same one elsewhere is taken."""
    config = student / "config.yaml"
    teacher = Path(yaml.safe_load(config.read_text())["teacher"]["path"])
    moved = Path(shutil.copytree(teacher, tmp_path / "moved"))
    config.write_text(config.read_text().replace(str(teacher), str(moved)))
    assert command("evaluate", student, *sets("evaluate.against_teacher=2"))[0] == 0
    before = (student / "evaluation" / "metrics.json").read_bytes()
    weights = next((moved / "pipeline" / "denoiser").glob("*.safetensors"))
    save_file({name: weight * 1.01 for name, weight in load_file(weights).items()}, weights)
    code, _, errors = command("evaluate", student, *sets("evaluate.against_teacher=2"))
    assert code == 2
    assert f"what `teacher.path` names ({moved}) has changed since this run began; bring it back" in errors
    assert (student / "evaluation" / "metrics.json").read_bytes() == before


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
