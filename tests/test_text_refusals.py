"""What cannot be prepared, trained or sampled from prompts is refused in one line, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import command
from diffusers import DiffusionPipeline, EDMEulerScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE, t5

from shd_diffusion.config import DistillConfig, TrainTeacherConfig, read_config, read_prepare_config
from shd_diffusion.data import prepare as prepare_module
from shd_diffusion.data.prepare import prepare
from shd_diffusion.errors import UserError
from shd_diffusion.models.factory import load_model, stored_dtype
from shd_diffusion.training.run import train

FAMILY = "pixart-sigma"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, images with captions, and their cache."""
    root = tmp_path_factory.mktemp("made")
    (root / "images").mkdir()
    for index in range(3):
        Image.new("RGB", SIZE, (80 * index, 0, 0)).save(root / "images" / f"{index}.png")
    lines = [json.dumps({"file_name": f"{index}.png", "text": f"red {index}"}) for index in range(3)]
    (root / "images" / "metadata.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    PIPELINES[FAMILY]().save_pretrained(root / "teacher")
    path = write(root, tree(root))
    config = read_prepare_config(path)
    prepare(config, Path(str(config.output)), str(path))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def tree(root: Path) -> dict[str, Any]:
    return {
        "output": str(root / "run"),
        "teacher": {"path": str(root / "teacher")},
        "student": {"arguments": {"num_attention_heads": 2, "cross_attention_dim": 24}},
        "data": {
            "name": "image_folder",
            "path": str(root / "images"),
            "image_size": SIZE[0],
            "caption_column": "text",
        },
        "prepare": {"output": str(root / "cache"), "prompt_arguments": ARGUMENTS[FAMILY]},
        "train": {"max_steps": 1, "batch_size": 2},
    }


def write(root: Path, content: dict[str, Any]) -> Path:
    (root / "config.yaml").write_text(yaml.safe_dump(content))
    return root / "config.yaml"


def files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def refused(root: Path, content: dict[str, Any], command: str) -> str:
    """The one line in which a command ends, after the config file's name."""
    path = write(root, content)
    before = files(root)
    with pytest.raises(UserError) as raised:
        if command == "prepare":
            config = read_prepare_config(path)
            prepare(config, Path(str(config.output)), str(path))
        else:
            kind: Any = DistillConfig if command == "distill" else TrainTeacherConfig
            run = read_config(path, kind)
            train(run, root / "run", str(path))
    message = str(raised.value)
    assert "\n" not in message and files(root) == before
    return message


def exchange_text_encoder(root: Path) -> None:
    torch.manual_seed(1)
    t5().save_pretrained(root / "teacher" / "text_encoder")


def exchange_tokenizer(root: Path) -> None:
    file = root / "teacher" / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 7}))


def spoil_class(root: Path) -> None:
    file = root / "teacher" / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "NoSuchPipeline"}))


def add_denoiser(root: Path) -> None:
    file = root / "teacher" / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"transformer_2": index["transformer"]}))


def of_edm(root: Path) -> None:
    EDMEulerScheduler().save_pretrained(root / "teacher" / "scheduler")
    file = root / "teacher" / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | {"scheduler": ["diffusers", "EDMEulerScheduler"]}))


def other_images(root: Path) -> None:
    shutil.copytree(root / "images", root / "images-2")
    Image.new("RGB", SIZE, "blue").save(root / "images-2" / "0.png")


def change_null(root: Path) -> None:
    file = root / "cache" / "null.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)


SIDE = 8
"""Pixels of a latent's, of which a patch has 2."""

Spoil = Callable[[Path], object]
Change = Callable[[dict[str, Any]], object]
NOTHING: Any = lambda _: None  # noqa: E731

REFUSED: dict[str, tuple[str, Spoil, Change, list[str]]] = {
    "no caption column": (
        "prepare",
        NOTHING,
        lambda c: c["data"].pop("caption_column"),
        ["config.yaml", "`data.caption_column` is missing", "name where the captions are"],
    ),
    "unknown argument of the call": (
        "prepare",
        NOTHING,
        lambda c: c["prepare"].update(prompt_arguments={"max_lenght": 3}),
        ["config.yaml", "`prepare.prompt_arguments`", "max_lenght"],
    ),
    "a folder that is no pipeline": (
        "prepare",
        spoil_class,
        NOTHING,
        ["config.yaml", "`data.caption_column`", "text-to-image pipeline"],
    ),
    "a cache of another length": (
        "prepare",
        NOTHING,
        lambda c: c["prepare"].update(prompt_arguments=ARGUMENTS[FAMILY] | {"max_sequence_length": 9}),
        ["manifest.json", "text encoder, tokenizer or caption length", "give another --output"],
    ),
    "prepare with another text encoder": (
        "prepare",
        exchange_text_encoder,
        NOTHING,
        ["manifest.json", "text encoder, tokenizer or caption length"],
    ),
    "distill with another text encoder": (
        "distill",
        exchange_text_encoder,
        NOTHING,
        ["config.yaml", "other text encoders or tokenizers than", "`prepare.output`"],
    ),
    "distill with another tokenizer": (
        "distill",
        exchange_tokenizer,
        NOTHING,
        ["config.yaml", "other text encoders or tokenizers than"],
    ),
    "nothing prepared": (
        "distill",
        NOTHING,
        lambda c: c["prepare"].update(output=c["prepare"]["output"] + "-2"),
        ["config.yaml", "cache-2", "`shd-diffusion prepare CONFIG`"],
    ),
    "no section prepare": (
        "distill",
        NOTHING,
        lambda c: c.pop("prepare"),
        ["config.yaml", "`teacher.path`", "run `shd-diffusion prepare` first"],
    ),
    "a student of other conditions": (
        "distill",
        NOTHING,
        lambda c: c["student"]["arguments"].update(caption_channels=6),
        ["config.yaml", "`student`", "encoder_hidden_states"],
    ),
    "a range of guidance for who is told none": (
        "distill",
        NOTHING,
        lambda c: c["train"].update(guidance_range=[1, 4]),
        ["config.yaml", "`train.guidance_range`", "remove it"],
    ),
    "more steps than the scheduler has": (
        "distill",
        NOTHING,
        lambda c: c.update(sample={"scheduler": "DDIMScheduler", "num_inference_steps": 5000}),
        ["config.yaml", "`sample.num_inference_steps` is 5000: `DDIMScheduler` cannot"],
    ),
    "sampling with what the call does not take": (
        "distill",
        NOTHING,
        lambda c: c.update(sample={"pipeline_arguments": {"max_lenght": 3}}),
        ["config.yaml", "`sample.pipeline_arguments.max_lenght`", "PixArtSigmaPipeline"],
    ),
    "sampling by prompt as by class": (
        "distill",
        NOTHING,
        lambda c: c.update(sample={"guidance_power": 2}),
        ["config.yaml", "`sample.guidance_power`", "by class"],
    ),
    "sampling classes": (
        "distill",
        NOTHING,
        lambda c: c.update(sample={"labels": [3, 5]}),
        ["config.yaml", "`sample.labels`", "by class"],
    ),
    "no pipeline where the teacher should be": (
        "prepare",
        NOTHING,
        lambda c: c["teacher"].update(path=c["teacher"]["path"] + "-2"),
        [
            "config.yaml",
            "key `teacher.path` or `pipeline`",
            "teacher-2 holds no pipeline",
            "model_index.json",
        ],
    ),
    "a tokenizer that is missing": (
        "prepare",
        lambda root: shutil.rmtree(root / "teacher" / "tokenizer"),
        NOTHING,
        ["teacher", "its folder `tokenizer` is missing"],
    ),
    "sizes that the patches do not divide": (
        "prepare",
        NOTHING,
        lambda c: c["data"].update(buckets=[[64, 64], [SIDE + 64, 64 - SIDE]]),
        ["config.yaml", f"multiples of {2 * SIDE}, not {SIDE + 64}×{64 - SIDE}", "`data.buckets`"],
    ),
    "a condition for none that has changed": (
        "distill",
        change_null,
        NOTHING,
        ["null.safetensors: damaged (has changed)", "prepare"],
    ),
    "a condition for none that is gone": (
        "distill",
        lambda root: (root / "cache" / "null.safetensors").unlink(),
        NOTHING,
        ["null.safetensors: damaged", "prepare"],
    ),
    "two denoisers": (
        "prepare",
        add_denoiser,
        NOTHING,
        ["has two denoisers, `transformer` and `transformer_2`, each for some of the timesteps"],
    ),
    "a scheduler of another kind of process": (
        "prepare",
        of_edm,
        NOTHING,
        ["config.yaml", "teacher cannot be trained here", "EDMEulerScheduler"],
    ),
    "images of another size than those of the cache": (
        "distill",
        NOTHING,
        lambda c: c["data"].update(image_size=128),
        ["config.yaml", "key `data.image_size`: is 128, but the cache was made with 64", "`prepare.output`"],
    ),
    "captions of another key": (
        "distill",
        NOTHING,
        lambda c: c["data"].update(caption_column="name"),
        ["config.yaml", "key `data.caption_column`: is 'name', but the cache was made with 'text'"],
    ),
    "another length of captions than the cache's": (
        "distill",
        NOTHING,
        lambda c: c["prepare"].update(prompt_arguments=ARGUMENTS[FAMILY] | {"max_sequence_length": 9}),
        ["config.yaml", "key `prepare.prompt_arguments`: is {", "but the cache was made with {"],
    ),
    "another precision of latents than the cache's": (
        "distill",
        NOTHING,
        lambda c: c["prepare"].update(dtype="float16"),
        ["config.yaml", "key `prepare.dtype`: is 'float16', but the cache was made with 'float32'"],
    ),
    "other images than those of the cache": (
        "distill",
        other_images,
        lambda c: c["data"].update(path=c["data"]["path"] + "-2"),
        ["config.yaml", "key `data.path`: ", "images-2 has other images than the cache was made of"],
    ),
    "captions without a pipeline": (
        "train-teacher",
        NOTHING,
        lambda c: (
            c.pop("teacher"),
            c.update(model={"class": "PixArtTransformer2DModel", "arguments": {}}),
            c.pop("student"),
        ),
        ["config.yaml", "`data.caption_column`", "set `pipeline`"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, root: Path) -> None:
    command, spoil, change, parts = REFUSED[case]
    content = tree(root)
    spoil(root)
    change(content)
    message = refused(root, content, command)
    assert all(part in message for part in parts), message


def test_images_that_moved_are_known(root: Path) -> None:
    """The cache is of the same images, wherever these lie by now, or if they are gone."""
    for name in ("images-2", "gone"):
        if name == "images-2":
            shutil.copytree(root / "images", root / name)
        content = tree(root)
        content["data"]["path"] = str(root / name)
        content["output"] = str(root / f"run-{name}")
        train(read_config(write(root, content), DistillConfig), root / f"run-{name}", "config.yaml")
        assert (root / f"run-{name}" / "summary.json").exists()


def test_data_of_another_pipeline_compress_nothing(root: Path) -> None:
    """As a distillation, in one line: other latents, other prompts, or none."""
    config = write(root, tree(root))
    for family, says in (("sdxl", "its own VAE"), ("sd3", "its own VAE")):
        PIPELINES[family]().save_pretrained(root / family)
        options = "--data", config, "--heads", 2, "--images", 64, "--output", root / "no"
        code, _, errors = command("compress", root / family, *options)
        assert code == 2 and says in errors.splitlines()[-1] and not (root / "no").exists(), errors
    exchange_text_encoder(root)
    code, _, errors = command("compress", root / "teacher", *options)
    assert code == 2 and "other text encoders or tokenizers than" in errors.splitlines()[-1], errors


def test_a_teacher_of_half_precision_stays_one(root: Path) -> None:
    """What is compressed is as small as its parameters say."""
    DiffusionPipeline.from_pretrained(root / "teacher", dtype=torch.bfloat16).save_pretrained(root / "half")
    content = tree(root)
    content["teacher"]["path"], content["prepare"]["output"] = str(root / "half"), str(root / "half-cache")
    config = read_prepare_config(write(root, content))
    prepare(config, root / "half-cache", "config.yaml")
    options = "--data", root / "config.yaml", "--heads", 2, "--images", 64, "--output", root / "small"
    code, _, errors = command("compress", root / "half", *options)
    assert code == 0, errors
    sizes = [
        (root / name / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
        for name in ("half", "small")
    ]
    assert sizes[1] < sizes[0]
    results = json.loads((root / "small" / "compression.json").read_text())
    assert results["dtype"] == "bfloat16"


def test_a_variant_beside_the_weights_does_not_say_their_precision(root: Path) -> None:
    DiffusionPipeline.from_pretrained(root / "teacher").save_pretrained(root / "both")
    half = DiffusionPipeline.from_pretrained(root / "teacher", dtype=torch.float16)
    half.save_pretrained(root / "both", variant="fp16")
    assert len([*(root / "both" / "transformer").glob("*.safetensors")]) == 2
    assert stored_dtype(root / "both" / "transformer") == torch.float32


def test_files_that_diffusers_has_to_load_first_are_told(root: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(root / "teacher")
    pipeline.save_pretrained(root / "variant", variant="fp16")
    pipeline.save_pretrained(root / "pickled", safe_serialization=False)
    weights = root / "teacher" / "transformer" / "diffusion_pytorch_model.safetensors"
    for path, says in (
        (root / "variant", "load its pipeline once with `variant='fp16'`"),
        (root / "pickled", "`save_pretrained` makes, with safetensors"),
        (weights, "is a file; load it once by `from_single_file`"),
    ):
        with pytest.raises(UserError, match=re.escape(says)):
            load_model(str(path))


def test_a_finished_cache_keeps_its_condition_for_none(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's differs in rounding, by which the cache would be another, and no run on it would go on."""
    cache, opened = root / "cache", prepare_module.open_encoder
    config = read_prepare_config(write(root, tree(root)))
    prepare(config, cache, "config.yaml")  # the copy's places are noted
    before = files(cache)

    def rounded(*arguments: Any) -> Any:
        encoder = opened(*arguments)
        encoder.null = {name: value * (1 + 1e-6) for name, value in encoder.null.items()}
        return encoder

    monkeypatch.setattr(prepare_module, "open_encoder", rounded)
    prepare(config, cache, "config.yaml")
    assert files(cache) == before
    (cache / "null.safetensors").unlink()
    prepare(config, cache, "config.yaml")
    assert files(cache) != before
