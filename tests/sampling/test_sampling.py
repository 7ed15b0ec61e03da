"""The pipeline and sampling by index."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, command, sets
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


def test_any_number_of_processes_write_the_same_files(runs: Path, tmp_path: Path) -> None:
    """Two processes under `torchrun`, through the launch file, against one; from a model that was trained."""
    for name in ("one", "two"):
        ignored = shutil.ignore_patterns("samples", "evaluation", "checkpoints")
        shutil.copytree(runs / "teacher", tmp_path / name, ignore=ignored)
    options = sets("sample.num_images=50", "sample.num_inference_steps=3", "sample.batch_size=16")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += [str(ROOT / "pipelines" / "sample.py"), str(tmp_path / "two"), *options]
    subprocess.run(launch, check=True, capture_output=True, timeout=300)
    assert command("sample", tmp_path / "one", *options)[0] == 0
    one, two = (files(tmp_path / name / "samples") for name in ("one", "two"))
    assert len(one) == 50 and one == two


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
