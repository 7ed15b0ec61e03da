"""A text-to-image run, sampled from a benchmark's prompts and evaluated, by the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import command, sets
from PIL import Image
from random_runs import write_summary
from tiny_pipelines import PIPELINES, SIZE

from shd_diffusion.config import DistillConfig, dump_config
from shd_diffusion.files import write_text

PROMPTS = ["a red heart", "b", "the sea at night"]
FEW = ["sample.images_per_prompt=4", "sample.num_inference_steps=2", "sample.pass_size=4"]


@pytest.fixture(scope="module")
def run(captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of Stable Diffusion's kind, as a distillation leaves it, and its teacher beside it."""
    folder = tmp_path_factory.mktemp("text") / "run"
    teacher = folder.with_name("teacher")
    PIPELINES["sd1.5"](4, 1).save_pretrained(teacher)
    PIPELINES["sd1.5"](2, 0).save_pretrained(folder / "pipeline")
    data = {"name": "image_folder", "path": str(captioned), "image_size": SIZE[0], "caption_column": "text"}
    config = DistillConfig.model_validate(
        {
            "data": data,
            "train": {"max_steps": 1, "batch_size": 1},
            "teacher": {"path": str(teacher)},
            "student": {"pretrained": str(teacher)},
        }
    )
    write_text(folder / "config.yaml", dump_config(config))
    write_summary(folder, "distill", 1)
    return folder


@pytest.fixture(scope="module")
def sampled(run: Path) -> Path:
    """The same with 12 samples, four of each prompt, also in GenEval's layout."""
    lines = [{"tag": "colors", "prompt": prompt} for prompt in PROMPTS]
    prompts = run.with_name("evaluation_metadata.jsonl")
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, errors = command("sample", run, "--prompts", prompts, "--layout", "geneval", *sets(*FEW))
    assert code == 0, errors
    return run


def test_samples_are_written_as_geneval_takes_them(sampled: Path) -> None:
    folder = sampled / "samples"
    assert json.loads((folder / "sampling.json").read_text())["prompts"] == [
        prompt for prompt in PROMPTS for _ in range(4)
    ]
    for index in range(12):
        image = folder / "geneval" / f"{index // 4:05d}" / "samples" / f"{index % 4:05d}.png"
        assert image.read_bytes() == (folder / f"{index:06d}.png").read_bytes()
    metadata = json.loads((folder / "geneval" / "00002" / "metadata.jsonl").read_text())
    assert metadata == {"tag": "colors", "prompt": "the sea at night"}


def test_dpg_bench_takes_its_folder_of_prompts(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("0", "b"), ("whoops3", "a cat")):
        (folder / f"{name}.txt").write_text(text)
    arguments = ["sample", run, "--prompts", folder, "--layout", "dpg_bench", "--output", tmp_path / "out"]
    assert command(*arguments, *sets(*FEW))[0] == 0
    with Image.open(tmp_path / "out" / "dpg_bench" / "whoops3.png") as grid:
        found = np.asarray(grid)
    with Image.open(tmp_path / "out" / "000006.png") as image:  # the third of the second prompt
        assert np.array_equal(found[SIZE[0] :, : SIZE[1]], np.asarray(image))
    assert len(list((tmp_path / "out" / "dpg_bench").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layout", "geneval"], "--layout geneval: needs the prompts of the benchmark; give them by --prompts"),
        (["--layout", "geneval", "--prompts", "{}"], "prompt 00000 has no key `tag`"),
        (["--layout", "dpg_bench", "--prompts", "{}"], "DPG-Bench takes 4 images of each prompt, not 1"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_laid_out_is_told_before_sampling(
    arguments: list[str], says: str, run: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("a cat\n")
    given = [argument.format(plain) for argument in arguments]
    code, _, errors = command("sample", run, *given, "--output", tmp_path / "out")
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and says in message[0], errors
    assert not (tmp_path / "out").exists()


def test_a_run_has_its_text_metrics(sampled: Path, clip_folder: Path, tmp_path: Path) -> None:
    """FD and CMMD are against the images of the captioned data; the prompts come from the samples."""
    settings = [f"evaluate.clip_model={clip_folder}", "evaluate.extractor=clip", "evaluate.against_teacher=3"]
    code, printed, errors = command("evaluate", sampled, *sets(*settings))
    assert code == 0, errors
    metrics = json.loads(printed)
    assert {"fid", "cmmd", "kid_mean", "clip_score", "r_precision"} <= metrics.keys()
    assert metrics["fid"] > 0 and metrics["protocol"]["num_reference_images"] == 12
    assert metrics["protocol"]["r_precision"] == "among 3 captions, seed 0"
    found = metrics["against_teacher"]
    assert found["indices"] == [0, 4, 8] and found["latent_mse"]["mean"] > 0
    assert found["latent_mse"]["n"] == 3 and found["protocol"]["height"] == SIZE[0]

    # metrics of prompts alone, where the data are elsewhere
    moved = Path(shutil.copytree(sampled, tmp_path / "moved"))
    alone = [settings[0], "data.path=nowhere", "evaluate.metrics=[clip_score]"]
    code, printed, errors = command("evaluate", moved, *sets(*alone))
    assert code == 0 and json.loads(printed)["clip_score"] == metrics["clip_score"], errors

    # data that are prompts alone have no images to compare with
    texts = tmp_path / "texts.txt"
    texts.write_text("a\nb\n")
    only = ["data.name=prompts", f"data.path={texts}", "data.caption_column=null"]
    code, printed, errors = command("evaluate", moved, *sets(*settings, *only))
    assert code == 0, errors
    without = json.loads(printed)
    assert "fid" not in without and without["against_teacher"] == metrics["against_teacher"]

    # a teacher in the student's place is no distance away from itself
    itself = Path(shutil.copytree(sampled, tmp_path / "itself"))
    shutil.rmtree(itself / "pipeline" / "unet")
    shutil.copytree(sampled.with_name("teacher") / "unet", itself / "pipeline" / "unet")
    code, printed, errors = command("evaluate", itself, *sets(*settings))
    assert code == 0 and json.loads(printed)["against_teacher"]["per_image"]["latent_mse"] == [0.0] * 3

    code, _, errors = command("evaluate", sampled, *sets(*settings[:2], "evaluate.against_teacher=4"))
    assert code == 2 and "has 3 different prompts; sample more, or lower it" in errors


def test_a_run_is_held_against_a_split_that_was_not_trained_on(
    sampled: Path, clip_folder: Path, captioned: Path, tmp_path: Path
) -> None:
    """Two of the three prompts are captions of the split, so that 8 of 12 images are judged."""
    datasets = pytest.importorskip("datasets")
    captions = [PROMPTS[0], PROMPTS[2], *(f"a {letter}" for letter in "cdefghijkl")]
    pictures = [{"bytes": file.read_bytes(), "path": None} for file in sorted(captioned.glob("*.png"))]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for split in ("train", "test"):
        table = datasets.Dataset.from_dict({"image": pictures, "caption": captions}, features=features)
        table.to_parquet(tmp_path / f"{split}.parquet")
    keys = f"name: huggingface, path: {tmp_path}, split: test, image_size: {SIZE[0]}, caption_column: caption"
    clip = [f"evaluate.clip_model={clip_folder}", "evaluate.extractor=clip"]
    metrics = ["evaluate.metrics=[fid,picture_precision]"]
    code, printed, errors = command(
        "evaluate", sampled, *sets(*clip, *metrics, f"evaluate.reference={{{keys}}}")
    )
    assert code == 0, errors
    found = json.loads(printed)
    assert 0 <= found["picture_precision_low"] <= found["picture_precision"] <= 1 and found["fid"] > 0
    assert found["protocol"]["reference"] == f"huggingface {tmp_path} test {SIZE[0]} px"
    assert found["protocol"]["num_reference_images"] == 12
    assert any("is of 8 images, as the prompts of 4 others" in warning for warning in found["warnings"])
    # the prompts are no captions of the data that are trained on
    code, _, errors = command("evaluate", sampled, *sets(*clip, *metrics))
    assert code == 2 and "`picture_precision` needs two or more different prompts that are captions" in errors
