"""Pipelines of diffusers, sampled as ours, against their own call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from huggingface_hub.utils import httpx

from shd_diffusion.errors import UserError
from shd_diffusion.sampling.published import hash_pipeline, open_pipeline


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


def test_what_is_not_sampled_by_class_is_refused(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a DDPMPipeline cannot be sampled by class; ClassConditional"):
        open_pipeline(str(tmp_path))


def test_a_pipeline_without_weights_is_refused(published: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes((published / "model_index.json").read_bytes())
    with pytest.raises(UserError, match=f"{tmp_path}: this pipeline cannot be loaded"):
        open_pipeline(str(tmp_path))


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
    with pytest.raises(UserError, match=r"nobody/nothing: no such run.* from the hub") as refused:
        open_pipeline("nobody/nothing")
    assert "\n" not in str(refused.value) and asked
