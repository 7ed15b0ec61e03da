"""The pipeline and sampling by index."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, command, sets
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from small_models import small_dit

from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError
from shd_diffusion.models.adapter import null_label
from shd_diffusion.randomness import generator
from shd_diffusion.sampling import ClassConditionalPipeline, generate, make_scheduler, sample_indices
from shd_diffusion.sampling.generate import labels_of
from shd_diffusion.sampling.passes import deal_passes


def tiny_pipeline(scheduler: str = "DDIMScheduler") -> ClassConditionalPipeline:
    torch.manual_seed(0)
    model = small_dit(2, layers=1).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # adaLN-zero would predict exactly nothing
            parameter.normal_(std=0.2)
    pipeline = ClassConditionalPipeline(
        model, make_scheduler(scheduler, {}, DDPMScheduler(clip_sample=False))
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CONFIG = SampleConfig(num_images=7, num_inference_steps=4, pass_size=3)

# Of images in [-1, 1]. A batch of another size is summed in another order; an error of the first prediction is divided
# by a_T = 0.006, and random weights and the solver's extrapolation add to it: float32 is 1.4e-5 from float64 and
# batches up to 3.6e-5 from each other, by the CPU. Images that differ at all differ by 0.1 and more.
ROUNDING = {"rtol": 0.0, "atol": 3e-4}


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
    torch.testing.assert_close(sample_indices(pipeline, [3, 1], CONFIG), together[[3, 1]], **ROUNDING)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_random_labels_follow_from_seed_and_index() -> None:
    random = CONFIG.model_copy(update={"labels": "random"})
    labels = labels_of(range(3000), 10, random)
    assert labels_of([2999, 7], 10, random) == [labels[2999], labels[7]]
    counts = torch.tensor(labels).bincount()
    assert len(counts) == 10 and ((counts - 300).square() / 300).sum() < 27.9  # χ² of 9 degrees, p = 0.001
    assert labels_of(range(3000), 10, random.model_copy(update={"seed": 1})) != labels
    assert labels_of(range(8, 12), 10, CONFIG) == [8, 9, 0, 1]


def test_random_labels_are_those_of_the_images(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"labels": "random"})
    summary = generate(tiny_pipeline(), config, tmp_path, {}, "test")
    assert summary["labels"] == labels_of(range(7), 10, config) and summary["protocol"]["labels"] == "random"
    noise = [torch.randn(1, 8, 8, generator=generator(0, "sample", index)) for index in range(6)]
    (images,) = tiny_pipeline()(
        summary["labels"][:6], 4, latents=torch.stack(noise), output_type="pt", return_dict=False
    )
    torch.testing.assert_close(
        images[:3] * 2 - 1, sample_indices(tiny_pipeline(), range(3), config), **ROUNDING
    )
    with pytest.raises(UserError, match=r"`labels` \('random', now 'balanced'\)"):
        generate(tiny_pipeline(), CONFIG, tmp_path, {}, "test")


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
    # In another batch the two predictions round otherwise, and guidance multiplies that by 3 + 2
    torch.testing.assert_close(guided, 3 * conditional - 2 * unconditional, rtol=0, atol=1e-4)
    torch.testing.assert_close(unguided, conditional, rtol=0, atol=2e-5)
    assert (conditional - unconditional).abs().max() > 1e-3


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_interrupted_sampling_ends_with_the_same_files(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = generate(pipeline, CONFIG, whole, {}, "test")
    assert summary["num_images"] == 7 and summary["labels"] == [0, 1, 2, 3, 4, 5, 6]
    assert sorted(files(whole)) == [f"{i:06d}.png" for i in range(7)]
    assert Image.open(whole / "000000.png").size == (8, 8)

    generate(pipeline, CONFIG, parts, {}, "test")
    kept = {index: (parts / f"{index:06d}.png").stat().st_mtime_ns for index in (0, 2, 6)}
    for index in (1, 3, 4, 5):  # a call that was killed, whatever it had got to
        (parts / f"{index:06d}.png").unlink()
    generate(pipeline, CONFIG, parts, {}, "test")
    assert files(parts) == files(whole)
    assert kept == {index: (parts / f"{index:06d}.png").stat().st_mtime_ns for index in kept}


def test_more_images_keep_those_that_are_there(tmp_path: Path) -> None:
    generate(tiny_pipeline(), CONFIG, tmp_path, {}, "test")
    before = files(tmp_path)
    more = generate(tiny_pipeline(), CONFIG.model_copy(update={"num_images": 8}), tmp_path, {}, "test")
    assert more["num_images"] == 8 and len(files(tmp_path)) == 8
    assert {name: files(tmp_path)[name] for name in before} == before


def test_fewer_images_forget_none_that_are_there(tmp_path: Path) -> None:
    generate(tiny_pipeline(), CONFIG, tmp_path, {}, "test")
    (tmp_path / "000001.png").unlink()
    fewer = generate(tiny_pipeline(), CONFIG.model_copy(update={"num_images": 3}), tmp_path, {}, "test")
    assert fewer["num_images"] == len(fewer["labels"]) == len(files(tmp_path)) == 7


@pytest.mark.parametrize("batch_size", [1, 50, 64, 1000])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_image_has_its_place_in_a_pass_of_one_size(batch_size: int, num_processes: int) -> None:
    config = SampleConfig(num_images=150, batch_size=batch_size)
    dealt = [deal_passes(config, process, num_processes) for process in range(num_processes)]
    assert sorted(pass_.start for passes in dealt for pass_ in passes) == [0, 32, 64, 96, 128]
    assert all(len(pass_) == 32 for passes in dealt for pass_ in passes)
    turn = -(-batch_size // 32)
    assert dealt[0][:turn] == [range(32 * i, 32 * i + 32) for i in range(min(turn, 5))]


def test_any_batch_size_number_of_processes_and_interruption_gives_the_same_files(
    runs: Path, tmp_path: Path
) -> None:
    """One process, two under `torchrun` through the launch file, three parts; from a model that was trained."""
    for name in ("one", "two", "parts"):
        ignored = shutil.ignore_patterns("samples", "evaluation", "checkpoints")
        shutil.copytree(runs / "teacher", tmp_path / name, ignore=ignored)
    options = sets("sample.num_inference_steps=3", "sample.num_images=150")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += [str(ROOT / "pipelines" / "sample.py"), str(tmp_path / "two"), *options]
    subprocess.run([*launch, *sets("sample.batch_size=50")], check=True, capture_output=True, timeout=300)
    assert command("sample", tmp_path / "one", *options, *sets("sample.batch_size=64"))[0] == 0
    for override in ("sample.num_images=37", "sample.num_images=101", "sample.batch_size=7"):
        assert command("sample", tmp_path / "parts", *options, *sets(override))[0] == 0
    one, two, parts = (files(tmp_path / name / "samples") for name in ("one", "two", "parts"))
    assert len(one) == 150 and one == two == parts
    protocols = [
        json.loads((tmp_path / name / "samples" / "sampling.json").read_text())["protocol"]
        for name in ("one", "two", "parts")
    ]
    assert protocols[0] == protocols[1] == protocols[2] and protocols[0]["pass_size"] == 32


def test_samples_of_another_protocol_are_not_mixed(tmp_path: Path) -> None:
    generate(tiny_pipeline(), CONFIG, tmp_path, {}, "test")
    with pytest.raises(UserError, match=r"sampling\.json.*`guidance_scale`"):
        generate(tiny_pipeline(), CONFIG.model_copy(update={"guidance_scale": 2.0}), tmp_path, {}, "test")
    with pytest.raises(UserError, match=r"sampling\.json.*`pass_size` \(3, now 4\)"):
        generate(tiny_pipeline(), CONFIG.model_copy(update={"pass_size": 4}), tmp_path, {}, "test")


def test_samples_of_before_passes_are_gone_on_with(tmp_path: Path) -> None:
    """Their `batch_size` was what `pass_size` is."""
    summary = generate(tiny_pipeline(), CONFIG, tmp_path, {}, "test")
    del summary["protocol"]["pass_size"], summary["protocol"]["labels"]
    (tmp_path / "sampling.json").write_text(json.dumps(summary | {"batch_size": 3}))
    with pytest.raises(UserError, match=r"`pass_size` \(3, now 32\); set it as it was"):
        generate(tiny_pipeline(), CONFIG.model_copy(update={"pass_size": 32}), tmp_path, {}, "test")
    before = files(tmp_path)
    more = generate(tiny_pipeline(), CONFIG.model_copy(update={"num_images": 8}), tmp_path, {}, "test")
    assert {name: files(tmp_path)[name] for name in before} == before and len(files(tmp_path)) == 8
    assert more["protocol"]["pass_size"] == 3 and "batch_size" not in more


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


def test_a_scheduler_of_another_objective_is_refused() -> None:
    flow, noise = FlowMatchEulerDiscreteScheduler(), DDPMScheduler()
    with pytest.raises(ValueError, match="predicts a flow, which `DDIMScheduler` does not sample by"):
        make_scheduler("DDIMScheduler", {}, flow)
    with pytest.raises(ValueError, match="predicts noise, which `FlowMatchEulerDiscreteScheduler`"):
        make_scheduler("FlowMatchEulerDiscreteScheduler", {}, noise)
    solver = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    assert make_scheduler("DPMSolverMultistepScheduler", solver, flow).config["use_flow_sigmas"]
    with pytest.raises(ValueError, match="predicts noise"):
        make_scheduler("DPMSolverMultistepScheduler", solver, noise)


def test_an_argument_goes_before_what_is_set_for_a_scheduler() -> None:
    arguments = {"variance_type": "learned"}
    found = make_scheduler("DPMSolverMultistepScheduler", arguments, DDPMScheduler())
    assert found.config["variance_type"] == "learned"


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_learned_variance_is_left_out_where_a_scheduler_has_no_use_for_it(scheduler: str) -> None:
    torch.manual_seed(0)
    model = small_dit(2, layers=1, out_channels=2).eval()
    plain = DDPMScheduler(clip_sample=False)
    learned = DDPMScheduler(clip_sample=False, variance_type="learned_range")
    images = []
    for trained_with in (plain, learned):
        pipeline = ClassConditionalPipeline(model, make_scheduler(scheduler, {}, trained_with))
        pipeline.set_progress_bar_config(disable=True)
        images.append(sample_indices(pipeline, range(3), CONFIG))
    assert torch.equal(*images)


def test_images_of_another_origin_are_left_alone(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "000000.png")
    with pytest.raises(UserError, match=r"has images of another origin, without a sampling\.json"):
        generate(tiny_pipeline(), CONFIG, tmp_path, {}, "test")
    assert list(tmp_path.iterdir()) == [tmp_path / "000000.png"]
