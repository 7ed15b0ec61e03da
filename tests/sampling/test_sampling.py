"""Sampling by index: what an image depends on, and what it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import ROOT, command, sets
from forks import launch
from PIL import Image
from tiny_pipelines import PIPELINES, SIZE

from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError
from shd_diffusion.files import write_json
from shd_diffusion.randomness import generator
from shd_diffusion.sample_folder import read_summary
from shd_diffusion.sampling import ClassConditionalPipeline, generate_images, sample_images
from shd_diffusion.sampling.batching import deal_passes
from shd_diffusion.sampling.by_class import ByClass, labels_of
from shd_diffusion.sampling.by_prompt import ByPrompt
from shd_diffusion.sampling.generate import _open
from shd_diffusion.sampling.sample_run import make_sampler

CONFIG = SampleConfig(num_images=7, num_inference_steps=4, pass_size=3)


def generate(
    pipeline: ClassConditionalPipeline, folder: Path, protocol: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    config = CONFIG.model_copy(update=changes)
    return generate_images(ByClass(pipeline, config), config, folder, protocol or {}, "runs/test")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_an_image_depends_on_its_index_alone(
    scheduler: str, random_pipeline: Callable[..., ClassConditionalPipeline]
) -> None:
    """In float64: the rounding of a matrix product depends on the batch, and a solver enlarges it some thousand times,
    which float32 shows at 1e-5 on some CPUs. diffusers' float32 tables are the same for each batch."""
    pipeline = random_pipeline(scheduler)
    pipeline.denoiser.double()
    together = sample_images(pipeline, [0, 1, 2, 3], CONFIG)
    torch.testing.assert_close(sample_images(pipeline, [3, 1], CONFIG), together[[3, 1]], rtol=0, atol=1e-6)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_random_labels_follow_from_seed_and_index() -> None:
    random = CONFIG.model_copy(update={"labels": "random"})
    labels = labels_of(range(3000), 10, random)
    assert labels is not None and labels_of([2999, 7], 10, random) == [labels[2999], labels[7]]
    counts = torch.tensor(labels).bincount()
    assert len(counts) == 10 and ((counts - 300).square() / 300).sum() < 27.9  # χ² of 9 degrees, p = 0.001
    assert labels_of(range(3000), 10, random.model_copy(update={"seed": 1})) != labels
    assert labels_of(range(8, 12), 10, CONFIG) == [8, 9, 0, 1]
    assert labels_of(range(3), None, CONFIG) is None


def test_random_labels_are_those_of_the_images(pipeline: ClassConditionalPipeline, tmp_path: Path) -> None:
    random = CONFIG.model_copy(update={"labels": "random"})
    summary = generate(pipeline, tmp_path, labels="random")
    assert summary["labels"] == labels_of(range(7), 10, random) and summary["protocol"]["labels"] == "random"
    noise = torch.stack([torch.randn(1, 8, 8, generator=generator(0, "sample", index)) for index in range(3)])
    (images,) = pipeline(summary["labels"][:3], 4, latents=noise, output_type="pt", return_dict=False)
    assert torch.equal(images * 2 - 1, sample_images(pipeline, range(3), random))
    with pytest.raises(UserError, match=r"`labels` \('random', now 'balanced'\); set it as it was"):
        generate(pipeline, tmp_path)


def test_interrupted_sampling_ends_with_the_same_files(
    pipeline: ClassConditionalPipeline, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = generate(pipeline, whole)
    assert summary["num_images"] == 7 and summary["labels"] == [0, 1, 2, 3, 4, 5, 6]
    assert sorted(files(whole)) == [f"{i:06d}.png" for i in range(7)]
    assert Image.open(whole / "000000.png").size == (8, 8) and len(set(files(whole).values())) == 7

    generate(pipeline, parts)
    kept = {index: (parts / f"{index:06d}.png").stat().st_mtime_ns for index in (0, 2, 6)}
    for index in (1, 3, 4, 5):  # a call that was killed, whatever it had got to
        (parts / f"{index:06d}.png").unlink()
    generate(pipeline, parts)
    assert files(parts) == files(whole)
    assert kept == {index: (parts / f"{index:06d}.png").stat().st_mtime_ns for index in kept}


def test_an_interrupted_extension_leaves_what_was_finished(
    pipeline: ClassConditionalPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(pipeline, tmp_path / "parts", num_images=4)
    passes = iter((True, False))

    def killed(*arguments: Any) -> torch.Tensor:
        if not next(passes):
            raise KeyboardInterrupt
        return sample_images(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("shd_diffusion.sampling.by_class.sample_images", killed)
        generate(pipeline, tmp_path / "parts", num_images=11)
    summary = read_summary(tmp_path / "parts")
    assert summary is not None and summary.num_images == 4 and summary.labels == [0, 1, 2, 3]
    assert len(files(tmp_path / "parts")) == 6  # of which the two of a pass that was finished are not counted
    assert generate(pipeline, tmp_path / "parts", num_images=11)["num_images"] == 11
    generate(pipeline, tmp_path / "whole", num_images=11)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_fewer_images_are_told_and_none_goes(pipeline: ClassConditionalPipeline, tmp_path: Path) -> None:
    generate(pipeline, tmp_path)
    (tmp_path / "000001.png").unlink()
    fewer = generate(pipeline, tmp_path, num_images=3)
    assert fewer["num_images"] == len(fewer["labels"]) == 3 and len(files(tmp_path)) == 7
    assert generate(pipeline, tmp_path)["num_images"] == 7


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
    run: Path, tmp_path: Path
) -> None:
    """One process, two by the launch file, and three parts, all on this machine."""
    options = sets("sample.num_inference_steps=3", "sample.num_images=150")
    one, two, parts = (tmp_path / name for name in ("one", "two", "parts"))
    arguments = [run, "--output", two, *options, *sets("sample.batch_size=50")]
    launch(2, ROOT / "pipelines" / "sample.py", *arguments)
    assert command("sample", run, "--output", one, *options, *sets("sample.batch_size=64"))[0] == 0
    for override in ("sample.num_images=37", "sample.num_images=101", "sample.batch_size=7"):
        assert command("sample", run, "--output", parts, *options, *sets(override))[0] == 0
    assert len(files(one)) == 150 and files(one) == files(two) == files(parts)
    protocols = [
        json.loads((folder / "sampling.json").read_text())["protocol"] for folder in (one, two, parts)
    ]
    assert protocols[0] == protocols[1] == protocols[2] and protocols[0]["pass_size"] == 32


def test_samples_of_another_protocol_are_not_mixed(
    pipeline: ClassConditionalPipeline, tmp_path: Path
) -> None:
    generate(pipeline, tmp_path)
    with pytest.raises(UserError, match=r"sampling\.json.*`guidance_scale` \(1.0, now 2.0\)"):
        generate(pipeline, tmp_path, guidance_scale=2.0)
    with pytest.raises(UserError, match=r"sampling\.json.*`pass_size` \(3, now 4\)"):
        generate(pipeline, tmp_path, pass_size=4)


def test_samples_of_other_weights_are_not_mixed(
    run: Path, make_run: Callable[..., Path], tmp_path: Path
) -> None:
    images, options = tmp_path / "images", sets("sample.num_images=4", "sample.num_inference_steps=2")
    assert command("sample", run, "--output", images, *options)[0] == 0
    before = files(images)
    assert command("sample", run, "--output", images, *options, *sets("train.ema_decay=0.5"))[0] == 2
    other = make_run(tmp_path / "other", seed=1)
    code, _, said = command("sample", other, "--output", images, *options)
    assert code == 2 and "were made with another `pipeline_sha256`" in said.splitlines()[-1]
    assert files(images) == before
    assert (
        json.loads((images / "sampling.json").read_text())["protocol"]["ema_decay"] == 0.995
    )  # the run's own


def test_a_place_that_cannot_be_is_told_on_a_line_of_its_own(run: Path, tmp_path: Path) -> None:
    """Not behind the bar, which has begun by then."""
    (tmp_path / "file").write_text("mine")
    options = sets("sample.num_images=1", "sample.num_inference_steps=1")
    code, _, said = command("sample", run, "--output", tmp_path / "file" / "x", *options)
    assert code == 2 and said.splitlines()[-1].startswith(
        f"error: {tmp_path / 'file' / 'x'}: Not a directory"
    )
    assert (tmp_path / "file").read_text() == "mine"


def test_images_of_another_origin_are_left_alone(pipeline: ClassConditionalPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "000000.png")
    with pytest.raises(UserError, match=r"holds files but no sampling\.json; give another"):
        generate(pipeline, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "000000.png"]


@pytest.mark.parametrize(
    "content", ["[]", "5", '{"num_images": -1}', '{"labels": 5}', '{"protocol": []}', "{"]
)
def test_a_damaged_summary_is_one_line(
    content: str, pipeline: ClassConditionalPipeline, tmp_path: Path
) -> None:
    (tmp_path / "sampling.json").write_text(content)
    with pytest.raises(UserError, match=r"sampling\.json: .*; delete the folder and sample anew") as refused:
        generate(pipeline, tmp_path)
    assert "\n" not in str(refused.value)


def test_images_that_are_no_numbers_are_not_written(
    pipeline: ClassConditionalPipeline, tmp_path: Path
) -> None:
    with torch.no_grad():
        pipeline.denoiser.proj_out_2.bias[0] = torch.nan
    with pytest.raises(UserError, match=r"runs/test: cannot be sampled \(its images are not finite"):
        generate(pipeline, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_pipeline_refuses_is_refused_before_there_is_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipeline = PIPELINES["flux-schnell"]()
    config = CONFIG.model_copy(update={"pipeline_arguments": {"max_sequence_length": 513}})
    sampler = ByPrompt(pipeline, config, ["owl"], SIZE)
    with pytest.raises(UserError, match=r"runs/test: cannot be sampled \(.*max_sequence_length"):
        generate_images(sampler, config, tmp_path / "new", {}, "runs/test")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given",
    [{"negative_prompt": "blurred"}, {"images_per_prompt": 4}, {"pipeline_arguments": {"eta": 1.0}}],
    ids=str,
)
def test_what_is_for_prompts_is_refused_by_class(
    given: dict[str, Any], pipeline: ClassConditionalPipeline
) -> None:
    with pytest.raises(
        UserError, match=rf"`sample\.{next(iter(given))}`: the pipeline makes images by class"
    ):
        make_sampler(pipeline, SampleConfig(**given), None)


def test_more_captions_of_the_same_data_go_on(tmp_path: Path) -> None:
    """Data give as many prompts as images need; a file of prompts is another one when it has more."""
    captions = ["a", "b", "c", "d"]
    before, now = {"prompts_sha256": "of two", "seed": 0}, {"prompts_sha256": "of four", "seed": 0}
    write_json(tmp_path / "sampling.json", {"num_images": 2, "prompts": captions[:2], "protocol": before})
    sampler: Any = SimpleNamespace(told=lambda count: {"prompts": captions[:count]})
    assert _open(tmp_path, now, sampler, SampleConfig(num_images=4)) is not None
    assert _open(tmp_path, now, sampler, SampleConfig(num_images=1)) is not None
    for prompts, others in ((None, ["a", "x"]), ("prompts.txt", captions)):
        sampler = SimpleNamespace(told=lambda count, others=others: {"prompts": others[:count]})
        with pytest.raises(UserError, match=r"made with another `prompts_sha256`.*; give the prompts"):
            _open(tmp_path, now, sampler, SampleConfig(num_images=4, prompts=prompts))
