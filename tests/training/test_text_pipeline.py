"""A pipeline that is made from a text encoder and images is one that plain diffusers loads and calls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from commands import command, sets
from diffusers import DiffusionPipeline
from PIL import Image
from tiny_pipelines import llm_tokenizer

from shd_diffusion.data.image_sets import ImagesInMemory
from shd_diffusion.data.images import from_bytes
from shd_diffusion.models.prompts import PromptEncoder
from shd_diffusion.training.autoencoder import AutoencoderConfig, train_autoencoder
from shd_diffusion.training.text_pipeline import model_of_package

SIZE = 16


def coloured(count: int, size: int = SIZE) -> torch.Tensor:
    """Plain images, 8-bit, (N, 3, size, size)."""
    levels = torch.randint(
        256, (count, 3, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return levels.expand(-1, -1, size, size)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny text encoder with a tokenizer, images, and a config of both."""
    folder = tmp_path_factory.mktemp("text-pipeline")
    tokenizer = llm_tokenizer(bos=True)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    transformers.BertModel(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    (folder / "images").mkdir()
    for number, image in enumerate(coloured(6)):
        Image.fromarray(np.asarray(image.permute(1, 2, 0))).save(folder / "images" / f"{number}.png")
    (folder / "make.yaml").write_text(
        f"""
data: {{name: image_folder, path: {folder / "images"}, image_size: {SIZE}}}
text_encoder: {folder / "encoder"}
autoencoder: {{latent_channels: 4, width: 8, max_steps: 3, batch_size: 2, crop_size: 8}}
"""
    )
    return folder


@pytest.fixture(scope="module")
def pipeline(root: Path) -> DiffusionPipeline:
    code, out, _ = command("make-pipeline", root / "make.yaml", "--output", root / "base")
    assert code == 0 and str(root / "base") in out
    loaded = DiffusionPipeline.from_pretrained(root / "base")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_plain_call_makes_an_image_of_the_right_size(pipeline: DiffusionPipeline) -> None:
    assert type(pipeline).__module__.startswith("diffusers.")
    assert pipeline("a cat", num_inference_steps=1).images[0].size == (SIZE, SIZE)


def test_a_prompt_has_the_same_condition_beside_others(pipeline: DiffusionPipeline) -> None:
    encoder = PromptEncoder(pipeline, (SIZE, SIZE))
    prompts = ["a", "a cat", "owls in trees"]
    together = encoder.encode(prompts)
    for prompt, entries in zip(prompts, together, strict=True):
        (alone,) = encoder.encode([prompt])
        assert entries["encoder_hidden_states"].shape == (16, 8)
        torch.testing.assert_close(entries, alone, rtol=1e-5, atol=1e-6)


def made(count: int, size: int = SIZE) -> ImagesInMemory:
    return ImagesInMemory(coloured(count, size), torch.zeros(count, dtype=torch.int64), 1, "made")


def test_cross_attention_around_a_vae_that_there_is(
    root: Path, pipeline: DiffusionPipeline, tmp_path: Path
) -> None:
    overrides = ["class=PixArtSigmaPipeline", f"vae={root / 'base'}", "autoencoder=null"]
    code, _, err = command(
        "make-pipeline", root / "make.yaml", "--output", tmp_path / "cross", *sets(*overrides)
    )
    assert code == 0, err
    made = DiffusionPipeline.from_pretrained(tmp_path / "cross")
    for name, weight in pipeline.vae.state_dict().items():
        assert torch.equal(made.vae.state_dict()[name], weight)
    made.set_progress_bar_config(disable=True)
    plain = {"max_sequence_length": 8, "clean_caption": False, "use_resolution_binning": False}
    assert made("a cat", num_inference_steps=1, **plain).images[0].size == (SIZE, SIZE)


def test_a_dry_run_of_a_teacher_in_it(root: Path, pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    config = tmp_path / "teacher.yaml"
    config.write_text(
        f"""
data: {{name: image_folder, path: {root / "images"}, image_size: {SIZE}, caption_column: text}}
pipeline: {root / "base"}
prepare: {{output: {tmp_path / "cache"}, prompt_arguments: {{max_sequence_length: 16}}}}
model: {{arguments: {{num_layers: 2}}}}
train: {{max_steps: 2, batch_size: 2}}
"""
    )
    code, out, err = command("train-teacher", config, "--dry-run")
    assert code == 0, err
    figures = json.loads(out)
    assert figures["sample"] == [4, 4, 4] and figures["condition"]["encoder_hidden_states"] == [16, 8]
    assert not (tmp_path / "cache").exists()


def test_it_follows_from_the_seed() -> None:
    config = AutoencoderConfig(width=8, crop_size=8, max_steps=3)
    weights = [next(train_autoencoder(made(6), config, seed).parameters()) for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_an_autoencoder_learns_its_images_and_scales_their_latents() -> None:
    images = made(32, size=8)
    config = AutoencoderConfig(width=16, max_steps=100, batch_size=16, crop_size=8, warmup_steps=10)
    vae = train_autoencoder(images, config, seed=0)
    targets = from_bytes(images.images)
    latents = vae.encode(targets).latents
    assert latents.shape == (32, 8, 2, 2)
    error = (vae.decode(latents).sample - targets).square().mean()
    assert error < 0.5 * targets.var()
    mean_square = (latents * vae.config.scaling_factor).square().mean()
    torch.testing.assert_close(mean_square, torch.tensor(1.0), rtol=1e-4, atol=0)


def test_faults_in_one_line_and_nothing_written(root: Path, tmp_path: Path) -> None:
    def error(*overrides: str, output: Path = tmp_path / "made") -> str:
        code, _, err = command("make-pipeline", root / "make.yaml", "--output", output, *overrides)
        assert code == 2 and not (tmp_path / "made").exists()
        return err.strip().splitlines()[-1]

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "holds files already; delete it" in error(output=tmp_path / "full")
    assert "key `autoencoder`: `crop_size` 32 is larger" in error("--set", "autoencoder.crop_size=32")
    assert "divide into latents" in error("--set", "data.image_size=18")
    assert "give either `vae`" in error("--set", "autoencoder=null")
    assert "key `autoencoder.max_step`" in error("--set", "autoencoder.max_step=3")
    message = error("--set", f"text_encoder={tmp_path}")
    assert "key `text_encoder`" in message and "pip install 'shd-diffusion[text-demo]'" in message


def test_a_package_without_a_model_is_none() -> None:
    assert model_of_package("numpy") is None and model_of_package("no-such-package") is None
