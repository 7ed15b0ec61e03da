"""Pipelines of diffusers, sampled as ours, against their own call; and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import command, sets
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub.utils import httpx
from safetensors.torch import load_file, save_file
from tiny_pipelines import stable_diffusion
from transformers import CLIPConfig, CLIPImageProcessor

from shd_diffusion.errors import UserError
from shd_diffusion.sampling.open_pipeline import hash_pipeline, open_pipeline


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a DiTPipeline of 1,000 classes that predicts a variance, all of it tiny and random."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, in_channels=4, out_channels=8, sample_size=4,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    for parameter in transformer.parameters():  # adaLN-zero would predict exactly nothing
        torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("published") / "dit"
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(transformer, vae, scheduler, id2label={0: "tench"}).save_pretrained(folder)
    return folder


def test_a_dit_pipeline_gives_the_images_of_its_own_call(published: Path) -> None:
    labels = [0, 999, 7]
    for guidance in (1.0, 4.0):
        images = []
        for pipeline in (open_pipeline(str(published)), DiTPipeline.from_pretrained(published)):
            pipeline.set_progress_bar_config(disable=True)
            generators = [torch.Generator().manual_seed(label) for label in labels]
            options = {"output_type": "np", "num_inference_steps": 4, "guidance_scale": guidance}
            images.append(torch.from_numpy(pipeline(labels, generator=generators, **options).images))
        assert images[0].shape == (3, 8, 8, 3) and images[0].std() > 0.05
        torch.testing.assert_close(images[0], images[1])


def test_the_hash_is_of_the_weights(published: Path, tmp_path: Path) -> None:
    pipeline = open_pipeline(str(published))
    pipeline.save_pretrained(tmp_path / "ours")
    assert hash_pipeline(open_pipeline(str(tmp_path / "ours"))) == hash_pipeline(pipeline)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias += 1
    assert hash_pipeline(open_pipeline(str(published))) != hash_pipeline(pipeline)


def test_an_unconditional_pipeline_gives_the_images_of_its_own_call(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    images = []
    for pipeline, options in (
        (open_pipeline(str(tmp_path)), {"num_images": 2}),
        (DDPMPipeline.from_pretrained(tmp_path), {"batch_size": 2}),
    ):
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(index) for index in range(2)]
        found = pipeline(generator=generators, num_inference_steps=4, output_type="np", **options).images
        images.append(torch.from_numpy(found))
    assert images[0].shape == (2, 8, 8, 3) and images[0].std() > 0.05
    torch.testing.assert_close(images[0], images[1])


def test_what_is_sampled_by_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableVideoDiffusionPipeline"}')
    with pytest.raises(UserError, match="a StableVideoDiffusionPipeline is not sampled by prompt, by class"):
        open_pipeline(str(tmp_path))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


DENOISER, WEIGHTS = "denoiser/config.json", "denoiser/diffusion_pytorch_model.safetensors"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no index": lambda folder: (folder / "model_index.json").unlink(),
    "index cut off": lambda folder: (folder / "model_index.json").write_text("{"),
    "index a list": lambda folder: (folder / "model_index.json").write_text("[]"),
    "index without a class": lambda folder: edit(folder / "model_index.json", _class_name=None),
    "no scheduler": lambda folder: edit(folder / "model_index.json", scheduler=[None, None]),
    "sample_shape a word": lambda folder: edit(folder / "model_index.json", sample_shape="abc"),
    "denoiser a number": lambda folder: edit(folder / "model_index.json", denoiser=5),
    "no denoiser": lambda folder: shutil.rmtree(folder / "denoiser"),
    "config a list": lambda folder: (folder / DENOISER).write_text("[]"),
    "config not UTF-8": lambda folder: (folder / DENOISER).write_bytes(b"\xff\xfe{"),
    "no heads": lambda folder: edit(folder / DENOISER, num_attention_heads=0),
    "heads a word": lambda folder: edit(folder / DENOISER, num_attention_heads="2"),
    "other heads": lambda folder: edit(folder / DENOISER, num_attention_heads=3),
    "no activation": lambda folder: edit(folder / DENOISER, activation_fn="zzz"),
    "quantization": lambda folder: edit(folder / DENOISER, quantization_config={"a": 1}),
    "scheduler a list": lambda folder: (folder / "scheduler/scheduler_config.json").write_text("[]"),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "weights cut off": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:999]),
    "a weight missing": lambda folder: edit_weights(folder / WEIGHTS, lambda t: t.pop("proj_out_2.bias")),
    "a weight NaN": lambda folder: edit_weights(
        folder / WEIGHTS, lambda t: t["proj_out_2.bias"].fill_(torch.nan)
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_is_one_line(damage: str, run: Path) -> None:
    DAMAGES[damage](run / "pipeline")
    code, printed, said = command("sample", run, *sets("sample.num_images=1", "sample.num_inference_steps=1"))
    message = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (code, printed) == (2, "") and said.endswith(f"{message[-1]}\n") and len(message) == 1
    assert f"{run / 'pipeline'}: " in message[0] and not (run / "samples").exists()
    if damage.startswith("a weight"):
        assert "proj_out_2.bias" in message[0]


def test_a_missing_folder_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    with pytest.raises(UserError, match=r"runs/mistyped: no such run, .* here$"):
        open_pipeline("runs/mistyped")


@pytest.mark.parametrize("failure", [httpx.ConnectError("no route"), httpx.ConnectTimeout("too long")])
def test_a_hub_that_cannot_be_reached_is_one_line(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def refuse(*where: object, **_: object) -> None:
        asked.append(where)
        raise failure

    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"nobody/nothing: no such run.* on the hub") as refused:
        open_pipeline("nobody/nothing")
    assert "\n" not in str(refused.value) and asked


def test_no_safety_checker_blacks_out_what_is_measured(tmp_path: Path) -> None:
    """One that flags everything: left on, the images would be black."""
    side = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**side, "image_size": 32, "patch_size": 16}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=side, vision_config=vision, projection_dim=4)
    )
    checker.concept_embeds_weights.data.fill_(-10)
    pipeline = stable_diffusion()
    extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipeline.register_modules(safety_checker=checker, feature_extractor=extractor)
    pipeline.register_to_config(requires_safety_checker=True)
    pipeline.save_pretrained(tmp_path)
    call = {"prompt": "a", "num_inference_steps": 1, "output_type": "np", "height": 64, "width": 64}
    assert not DiffusionPipeline.from_pretrained(tmp_path)(**call).images.any()
    assert open_pipeline(str(tmp_path))(**call).images.any()
