"""Extractors: the classifiers' recipe, weights that cannot be had, and the networks of torch-fidelity."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch_fidelity.feature_extractor_clip import CLIPVisual

from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import classifiers, load_extractor


def test_the_digits_classifier_is_good_and_says_how_good(digits):
    images, labels = digits
    extractor = load_extractor("digits-classifier")
    with torch.no_grad():
        roles = extractor.roles(images)
    assert roles["features"].shape == (1797, 64) and roles["logits"].shape == (1797, 10)
    assert extractor.accuracy > 0.97
    held_out = torch.arange(1797) % 5 == 0
    right = roles["logits"].argmax(1)[held_out] == labels[held_out]
    assert extractor.accuracy == pytest.approx(right.double().mean().item())


def test_the_recipe_gives_the_same_weights_whatever_the_threads_and_the_random_state(monkeypatch, tmp_path):
    monkeypatch.setattr(classifiers, "RECIPES", {"digits-classifier": classifiers.Recipe(8, 1, classifiers._digits)})
    hashes = set()
    threads = torch.get_num_threads()
    for number in (1, 2):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(number)))
        torch.set_num_threads(number)
        torch.manual_seed(number)
        state = torch.get_rng_state()
        path = classifiers.trained_classifier("digits-classifier")
        assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == number
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    torch.set_num_threads(threads)
    assert len(hashes) == 1


def test_the_classifier_is_trained_once(monkeypatch):
    path = classifiers.trained_classifier("digits-classifier")
    monkeypatch.setattr(classifiers, "_train", lambda *_: pytest.fail("trained again"))
    assert classifiers.trained_classifier("digits-classifier") == path


def write_fashion_mnist(folder: Path, counts: dict[str, int]) -> None:
    """Files in the format of Fashion-MNIST: class c is a bright row 2c."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        labels = generator.integers(0, 10, count).astype(np.uint8)
        images = generator.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        images[np.arange(count), 2 * labels] = 250
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = (0x800 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (folder / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())
            with gzip.open(folder / f"{name}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())


def test_fashion_mnist_classifier(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_fashion_mnist(tmp_path / "shd-diffusion/FashionMNIST/raw", {"train": 640, "t10k": 100})
    extractor = load_extractor("fashion-mnist-classifier")
    assert extractor.accuracy > 0.9
    assert extractor(torch.zeros(2, 3, 28, 28, dtype=torch.uint8)).shape == (2, 64)
    with pytest.raises(ValueError, match=r"takes uint8 images \(N, 3, 28, 28\)"):
        extractor(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_fashion_mnist_that_cannot_be_downloaded(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def offline(*_args, **_kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    with pytest.raises(UserError, match=r"put its four .gz files into .*FashionMNIST/raw"):
        load_extractor("fashion-mnist-classifier")


def test_inception_that_cannot_be_downloaded_says_which_file_to_supply(monkeypatch, tmp_path):
    def offline(*_):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as refused:
        load_extractor("inception-v3-compat")
    assert "https://github.com/toshas/torch-fidelity/releases" in str(refused.value)
    assert "set `evaluate.extractor_weights` to the file weights-inception-2015-12-05-6726825d.pth" in str(refused.value)


def test_unknown_missing_and_foreign_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"`inception` is unknown; known here: digits-classifier, .*dinov2-vit-l-14"):
        load_extractor("inception")
    with pytest.raises(UserError, match=r"absent.pth is missing; weights-inception.* is published at https://"):
        load_extractor("inception-v3-compat", tmp_path / "absent.pth")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("digits-classifier", "inception-v3-compat", "dinov2-vit-s-14"):
        with pytest.raises(UserError, match=f"other.safetensors does not hold weights of `{name}`"):
            load_extractor(name, tmp_path / "other.safetensors")


class Surprise:
    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


@pytest.mark.parametrize("name", ["inception-v3-compat", "dinov2-vit-s-14", "clip-vit-b-32"])
def test_pickled_code_is_not_run(name, tmp_path):
    torch.save({"weight": Surprise()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"does not hold weights of `{name}`"):
        load_extractor(name, tmp_path / "weights.pth")


class TinyCLIP(nn.Module):
    """The parts of a CLIP archive that torch-fidelity reads."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = CLIPVisual(16, 32, 2, 64, 16).visual
        self.text_projection = nn.Parameter(torch.zeros(8, 16))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.visual(images)


def test_clip_features_come_from_the_file(tmp_path):
    torch.manual_seed(0)
    network = TinyCLIP().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    network.half().float()  # torch-fidelity rounds the weights to float16 on the way
    path = tmp_path / "clip.pt"
    torch.jit.trace(network, torch.zeros(1, 3, 32, 32)).save(str(path))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, deviation = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    scaled = (images / 255 - mean[:, None, None]) / deviation[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(load_extractor("clip-vit-b-32", path)(images), network(scaled), rtol=2e-2, atol=2e-2)
