"""Images to evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_clip import save_clip
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torchvision.transforms.functional import to_pil_image

from shd_diffusion.data.digits import digits_uint8


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """All digits, (1797, 3, 8, 8), and their labels."""
    images, labels = digits_uint8()
    return images.expand(-1, 3, -1, -1), labels


@pytest.fixture(scope="session")
def photographs() -> tuple[Tensor, Tensor]:
    """12 and 14 images (N, 3, 32, 32) of smooth colours, the second much darker."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(26, 3, 5, 5, generator=generator) * 255
    images = nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 255)
    return images[:12].to(torch.uint8), (images[12:] * 0.3).to(torch.uint8)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of Inception with random weights, scaled so that its signals neither die out nor blow up."""
    kind = inception.FeatureExtractorInceptionV3
    with (
        mock.patch.object(inception, "load_state_dict_from_url", return_value={}),
        mock.patch.object(kind, "load_state_dict"),
        torch.random.fork_rng(),
    ):
        torch.manual_seed(0)
        network = kind("inception-v3-compat", ["2048"])
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP model of random weights."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory, photographs: tuple[Tensor, Tensor]) -> Path:
    """A folder of 12 images with 6 different prompts in its metadata.jsonl."""
    folder = tmp_path_factory.mktemp("captioned")
    lines = []
    for index, image in enumerate(photographs[0]):
        to_pil_image(image).save(folder / f"{index:02d}.png")
        lines.append({"file_name": f"{index:02d}.png", "text": f"a {'abcdef'[index // 2]} picture"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
