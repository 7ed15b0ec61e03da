"""Any diffusers pipeline in, the same kind of pipeline out: prepare, three steps of distillation, sample, export."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE

from shd_diffusion.config import DistillConfig, read_config, read_prepare_config
from shd_diffusion.data.prepare import prepare
from shd_diffusion.errors import UserError
from shd_diffusion.models.prompts import denoiser_name
from shd_diffusion.randomness import generator
from shd_diffusion.reporting import write_report
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling.sample_run import sample_run
from shd_diffusion.training.run import train

CAPTIONS = [["a cat"], ["a red fox jumps", "fox"], ["tree"], ["two owls"], ["a cat"]]
PROMPTS = ["a cat", "owl"]
STEPS = 2


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    lines = []
    for index, captions in enumerate(CAPTIONS):
        pixels = numbers.integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def student_arguments(name: str) -> dict[str, Any]:
    """What the config of a denoiser with half the heads has otherwise."""
    configs = []
    for heads in (4, 2):
        pipeline = PIPELINES[name](heads=heads)
        configs.append(dict(getattr(pipeline, denoiser_name(pipeline)).config))
    return {key: value for key, value in configs[1].items() if value != configs[0][key]}


def write_config(name: str, root: Path, teacher: Path, **sections: Any) -> Path:
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    arguments = ARGUMENTS.get(name, {})
    tree: dict[str, Any] = {
        "output": str(root / "run"),
        "teacher": {"path": str(teacher)},
        "student": {"arguments": student_arguments(name)},
        "data": {
            "name": "image_folder",
            "path": str(root / "images"),
            "image_size": SIZE[0],
            "caption_column": "text",
        },
        "prepare": {"output": str(root / "cache"), "prompt_arguments": arguments, "shard_size": 3},
        "losses": {"output": {"weight": 1.0}, "shd": {"weight": 1.0}},
        "train": {"max_steps": 3, "batch_size": 2},
        "sample": {
            "prompts": str(root / "prompts.txt"),
            "num_images": len(PROMPTS),
            "num_inference_steps": STEPS,
            "pass_size": 1,
            "pipeline_arguments": arguments,
        },
    }
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys}
    (root / "config.yaml").write_text(yaml.safe_dump(tree))
    return root / "config.yaml"


def told_guidance(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What the config of a teacher needs that is told the guidance scale."""
    transformer = getattr(pipeline, "transformer", None)
    embedded = transformer is not None and transformer.config.get("guidance_embeds")
    return {"train": {"guidance_range": [1, 4]}} if embedded else {}


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory):
    """The run of a family, with samples; made once."""

    @cache
    def make(name: str) -> RunFolder:
        root = tmp_path_factory.mktemp(name)
        write_images(root / "images")
        torch.manual_seed(0)
        teacher = PIPELINES[name](heads=4)
        teacher.save_pretrained(root / "teacher", safe_serialization=True)
        path = write_config(name, root, root / "teacher", **told_guidance(teacher))
        config = read_prepare_config(path)
        prepare(config, Path(str(config.output)), str(path))
        distill = read_config(path, DistillConfig)
        train(distill, Path(str(distill.output)), str(path))
        run = RunFolder(root / "run")
        sample_run(run, run.read_config(), run.samples)
        return run

    return make


@pytest.mark.parametrize("name", PIPELINES)
def test_a_student_leaves_in_the_kind_of_pipeline_that_its_teacher_came_in(name: str, distilled) -> None:
    run = distilled(name)
    teacher = DiffusionPipeline.load_config(run.path.parent / "teacher")
    student = DiffusionPipeline.load_config(run.pipeline)
    assert student == teacher
    summary, sampled = (
        json.loads(run.summary_file.read_text()),
        json.loads((run.samples / "sampling.json").read_text()),
    )
    assert summary["heads"] < summary["teacher_heads"]
    assert sampled["prompts"] == PROMPTS
    log = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert {"denoise", "output", "shd"} <= log[-1]["terms"].keys()
    assert all(np.isfinite(term["value"]) for term in log[-1]["terms"].values())


def draw(run: dict[str, Any]) -> None:
    """The images of a run's prompts by its pipeline folder and diffusers alone, left as arrays."""
    pipeline = DiffusionPipeline.from_pretrained(run["pipeline"])
    pipeline.set_progress_bar_config(disable=True)
    for prompt, seed, image in zip(run["prompts"], run["seeds"], run["images"], strict=True):
        noise = [torch.Generator().manual_seed(seed)]
        found = pipeline(prompt=[prompt], generator=noise, output_type="np", **run["call"])[0]
        found = np.concatenate(list(found[0]), axis=1) if found.ndim == 5 else found[0]
        np.save(image, (found * 255).round().astype("uint8"))


def drawing(name: str, run: RunFolder, folder: Path) -> dict[str, Any]:
    """What `draw` is to do, with the seeds that `metadata.jsonl` tells."""
    lines = [json.loads(line) for line in (run.samples / "metadata.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [
        generator(0, "sample", index).initial_seed() for index in range(len(PROMPTS))
    ]
    height, width = SIZE
    size = {"height": height, "width": width, "num_inference_steps": STEPS}
    return {
        "pipeline": str(run.pipeline),
        "prompts": [line["text"] for line in lines],
        "seeds": [line["seed"] for line in lines],
        "images": [str(folder / f"{name}-{line['file_name']}.npy") for line in lines],
        "call": {**size, **ARGUMENTS.get(name, {})},
    }


def assert_drawn(run: RunFolder, images: list[str]) -> None:
    """Bit for bit."""
    for index, image in enumerate(images):
        with Image.open(run.samples / f"{index:06d}.png") as ours:
            assert np.array_equal(np.asarray(ours), np.load(image))


@pytest.mark.parametrize("name", PIPELINES)
def test_plain_diffusers_gives_the_same_images(name: str, distilled, tmp_path: Path) -> None:
    asked = drawing(name, distilled(name), tmp_path)
    draw(asked)
    assert_drawn(distilled(name), asked["images"])


FRESH = f"""
import json, sys
from typing import Any
import numpy as np, torch
from diffusers import DiffusionPipeline
{inspect.getsource(draw)}
for run in json.load(sys.stdin):
    draw(run)
assert not any(name.startswith("shd_diffusion") for name in sys.modules)
"""


def test_so_it_does_where_this_project_was_never_imported(distilled, tmp_path: Path) -> None:
    """A UNet, a transformer of cross-attention, and two of joint attention."""
    names = ["sd1.5", "pixart-sigma", "sd3.5", "flux-dev"]
    runs = [drawing(name, distilled(name), tmp_path) for name in names]
    subprocess.run([sys.executable, "-c", FRESH], input=json.dumps(runs), text=True, check=True)
    for name, run in zip(names, runs, strict=True):
        assert_drawn(distilled(name), run["images"])


@pytest.mark.parametrize("name", PIPELINES)
def test_attention_maps_name_the_words_of_their_prompt(name: str, distilled) -> None:
    run = distilled(name)
    with safe_open(run.attention_file, "pt") as file:
        description = json.loads(file.metadata()["description"])
        image = file.get_tensor("image")
        kinds = {block["student"]: block["kind"] for block in description["blocks"]}
        texts = {
            name: file.get_tensor(f"{name}/teacher_text")
            for name in kinds
            if f"{name}/teacher_text" in file.keys()  # noqa: SIM118
        }
    assert description["prompt"] in {caption for captions in CAPTIONS for caption in captions}
    assert image.shape == (3, *SIZE)  # decoded
    words = description["words"]
    spelled = "".join(word["text"] for word in words).replace(" ", "")
    assert description["prompt"].replace(" ", "") in spelled or spelled.endswith("<|endoftext|>")  # cut off
    keys = [key for word in words for key in word["keys"]]
    assert len(set(keys)) == len(keys)
    assert bool(texts) == (name not in ("lumina2", "z-image"))  # which join both before their first block
    for block, text in texts.items():
        shares = text.sum(0)  # of each patch
        assert max(keys) < len(text) and shares.max() < 1 + 1e-5
        if kinds[block] == "cross":
            torch.testing.assert_close(shares, torch.ones_like(shares))


def test_the_report_shows_a_runs_prompts_and_words(distilled, tmp_path: Path) -> None:
    page = write_report([distilled("sd3").path], tmp_path / "report.html").read_text()
    for prompt in PROMPTS:
        assert f'title="{prompt}"' in page
    assert "Which words the patches of the image attend to" in page
    assert "<small>text_encoder_3</small>" in page and "&lt;|startoftext|&gt;" in page


def test_the_loss_on_fixed_captions_while_training(distilled, tmp_path: Path) -> None:
    """FID while training is for images by class; the loss is for any data, and changes nothing of the run."""
    first = distilled("pixart-sigma")
    config = first.read_config()
    assert isinstance(config, DistillConfig)
    for loss_images, name in ((0, "refused"), (4, "watched")):
        validation = config.train.validation.model_copy(update={"every": 1, "loss_images": loss_images})
        watched = config.model_copy(
            update={"train": config.train.model_copy(update={"validation": validation})}
        )
        if not loss_images:
            with pytest.raises(
                UserError, match=r"^c\.yaml: key `train\.validation\.every`: .* `train\.validation\.loss_"
            ):
                train(watched, tmp_path / name, "c.yaml")
            assert not (tmp_path / name).exists()
        else:
            train(watched, tmp_path / name, "c.yaml")
    logs = [
        [json.loads(line) for line in RunFolder(path).metrics_file.read_text().splitlines()]
        for path in (first.path, tmp_path / "watched")
    ]
    assert len(logs[1]) == 3  # logged with each validation
    assert all(line["validation"]["terms"].keys() == line["terms"].keys() for line in logs[1])
    assert logs[1][-1]["terms"] == logs[0][-1]["terms"]


@pytest.mark.parametrize("name", ["flux-schnell", "lumina2", "wan", "sdxl"])
def test_a_narrow_student_that_is_squeezed_begins_closer_to_its_teacher(
    name: str, distilled: Any, tmp_path: Path
) -> None:
    root, first = distilled(name).path.parent, {}
    for init in ("random", "squeeze"):
        changes = [f"student.init={init}", "train.max_steps=1", "train.batch_size=32"]
        changes += ["student.init_images=128"] * (init == "squeeze")
        config = read_config(root / "config.yaml", DistillConfig, changes)
        train(config, tmp_path / init, "config.yaml")
        (line,) = (tmp_path / init / "metrics.jsonl").read_text().splitlines()
        first[init] = json.loads(line)["terms"]["output"]["value"]
    assert first["squeeze"] < 0.7 * first["random"]
