"""Extractors: the classifiers' recipe, weights that cannot be had, and the networks of torch-fidelity."""

from __future__ import annotations

import hashlib
import sys
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch_fidelity.feature_extractor_clip import CLIPVisual
from transformers import Dinov2Config, Dinov2Model

from shd_diffusion.data.image_sets import ImagesInMemory
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import classifiers, load_extractor
from shd_diffusion.evaluation.dinov2 import convert, resize_positions
from shd_diffusion.evaluation.extractors import is_published


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
    monkeypatch.setattr(
        classifiers, "RECIPES", {"digits-classifier": classifiers.Recipe(8, 1, classifiers._digits)}
    )
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


def test_fashion_mnist_classifier(monkeypatch, tmp_path):
    """Its recipe, on images in which class c is a bright row 3c."""

    def rows(_folder: None, split: str) -> ImagesInMemory:
        labels = torch.arange(640 if split == "train" else 100) % 10
        images = torch.randint(0, 60, (len(labels), 1, 32, 32), generator=torch.Generator().manual_seed(0))
        images[torch.arange(len(labels)), 0, 3 * labels] = 250
        return ImagesInMemory(images.to(torch.uint8), labels, 10, "rows")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(classifiers, "fashion_mnist", rows)
    extractor = load_extractor("fashion-mnist-classifier")
    assert extractor.accuracy > 0.9
    assert extractor(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 64)
    with pytest.raises(ValueError, match=r"takes uint8 images \(N, 3, 32, 32\)"):
        extractor(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_inception_that_cannot_be_downloaded_says_which_file_to_supply(monkeypatch, tmp_path):
    def offline(*_):
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as refused:
        load_extractor("inception-v3-compat")
    assert "https://github.com/toshas/torch-fidelity/releases" in str(refused.value)
    assert "set `evaluate.extractor_weights` to the file weights-inception-2015-12-05-6726825d.pth" in str(
        refused.value
    )


def test_unknown_missing_and_foreign_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"`inception` is unknown; did you mean `inception-v3-compat`"):
        load_extractor("inception")
    with pytest.raises(
        UserError, match=r"absent.pth is missing; weights-inception.* is published at https://"
    ):
        load_extractor("inception-v3-compat", tmp_path / "absent.pth")
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name in ("digits-classifier", "inception-v3-compat", "dinov2-vit-s-14"):
        with pytest.raises(UserError, match=f"other.safetensors does not hold weights of `{name}`"):
            load_extractor(name, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:20])
    with pytest.raises(UserError, match=r"cut\.safetensors does not hold weights"):
        load_extractor("digits-classifier", tmp_path / "cut.safetensors")


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


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_clip_features_come_from_the_file(tmp_path):
    torch.manual_seed(0)
    network = TinyCLIP().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    network.half().float()  # torch-fidelity rounds the weights to float16 on the way
    path = tmp_path / "clip.pt"
    torch.jit.trace(network, torch.zeros(1, 3, 32, 32)).save(str(path))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        expected = network((images / 255 - mean) / deviation)
    torch.testing.assert_close(load_extractor("clip-vit-b-32", path)(images), expected)


def published_dinov2(width: int, depth: int, positions: int) -> dict[str, torch.Tensor]:
    """Random weights of a DINOv2, by the names of the published files."""
    shapes = {"cls_token": (1, 1, width), "mask_token": (1, width), "pos_embed": (1, positions, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    for index in range(depth):
        block = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        block |= {"norm2": (width,), "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        shapes |= {f"blocks.{index}.{name}.weight": shape for name, shape in block.items()}
        shapes |= {f"blocks.{index}.{name}.bias": shape[:1] for name, shape in block.items()}
        shapes |= {f"blocks.{index}.ls{number}.gamma": (width,) for number in (1, 2)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_dinov2_equals_torch_s_own_transformer(tmp_path):
    """In float64: `nn.TransformerEncoderLayer`s, into whose last weights the scales (`gamma`) are multiplied."""
    weights = published_dinov2(width=128, depth=2, positions=1 + 16 * 16)
    save_file(weights, tmp_path / "dinov2.safetensors")
    state = {name: tensor.double() for name, tensor in weights.items()}

    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)[:, None, None]
    deviation = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)[:, None, None]
    normalised = (images / 255 - mean) / deviation
    patches = normalised.unfold(2, 14, 14).unfold(3, 14, 14)  # (2, 3, 16, 16, 14, 14)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(2, 256, -1)
    tokens = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    tokens = torch.cat([state["cls_token"].expand(2, -1, -1), tokens], dim=1) + state["pos_embed"]
    for index in range(2):
        block = {name.split(".", 2)[2]: value for name, value in state.items() if f"blocks.{index}." in name}
        layer = nn.TransformerEncoderLayer(
            128,
            2,
            512,
            0.0,
            "gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
            dtype=torch.float64,
        )
        for kind in ("weight", "bias"):
            scales = [block[f"ls{n}.gamma"].reshape((-1, 1) if kind == "weight" else -1) for n in (1, 2)]
            layer.load_state_dict(
                {
                    f"self_attn.in_proj_{kind}": block[f"attn.qkv.{kind}"],
                    f"self_attn.out_proj.{kind}": block[f"attn.proj.{kind}"] * scales[0],
                    f"linear1.{kind}": block[f"mlp.fc1.{kind}"],
                    f"linear2.{kind}": block[f"mlp.fc2.{kind}"] * scales[1],
                    f"norm1.{kind}": block[f"norm1.{kind}"],
                    f"norm2.{kind}": block[f"norm2.{kind}"],
                },
                strict=False,
            )
        with torch.no_grad():
            tokens = layer.train()(tokens)
    expected = nn.functional.layer_norm(
        tokens[:, 0], (128,), state["norm.weight"], state["norm.bias"], eps=1e-6
    )
    extractor = load_extractor("dinov2-vit-s-14", tmp_path / "dinov2.safetensors")
    found = extractor.network.model.double()(normalised)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # The extractor itself is in float32: features of order 0.5, off by up to 7e-7 on the machines that were tried.
    single = load_extractor("dinov2-vit-s-14", tmp_path / "dinov2.safetensors")(images)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-5)


def test_dinov2_is_transformers_own_model(tmp_path):
    """The published names are those of `Dinov2Model`, all of them, and its class token is what comes out."""
    weights = published_dinov2(width=64, depth=3, positions=1 + 16 * 16)
    config = Dinov2Config(
        hidden_size=64, num_attention_heads=1, num_hidden_layers=3, image_size=224, patch_size=14
    )
    model = Dinov2Model(config).eval()
    assert convert(weights).keys() == model.state_dict().keys()
    model.load_state_dict(convert(weights))
    save_file(weights, tmp_path / "dinov2.safetensors")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = model((images / 255 - mean[:, None, None]) / deviation[:, None, None]).pooler_output
        found = load_extractor("dinov2-vit-s-14", tmp_path / "dinov2.safetensors")(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32, normalised in another order


def test_dinov2_resizes_its_position_table_as_published():
    """The published models, learnt on 37×37 patches, add 0.1 to the wanted grid before they divide by theirs."""
    table = torch.randn(1, 1 + 37 * 37, 64)
    grid = table[:, 1:].reshape(1, 37, 37, 64).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")
    found = resize_positions(table)
    torch.testing.assert_close(found[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2))
    assert torch.equal(found[:, :1], table[:, :1])


def test_dinov2_without_transformers_says_what_to_install(tmp_path, monkeypatch):
    save_file(published_dinov2(width=64, depth=1, positions=257), tmp_path / "dinov2.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        UserError, match=r"needs the library `transformers`; pip install 'shd-diffusion\[dino\]'"
    ):
        load_extractor("dinov2-vit-s-14", tmp_path / "dinov2.safetensors")


def test_weights_that_are_not_the_published_ones_have_another_name() -> None:
    url = "https://host/weights-inception-2015-12-05-6726825d.pth"
    assert is_published(url, "6726825d" + "0" * 56) and not is_published(url, "0" * 64)
    by_folder = f"https://host/clip/models/{'ab' * 32}/ViT-B-32.pt"
    assert is_published(by_folder, "ab" * 32) and not is_published(by_folder, "0" * 64)
    assert is_published(None, "0" * 64) and is_published("https://host/dinov2_vits14_pretrain.pth", "0" * 64)
