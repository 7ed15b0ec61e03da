"""References of every kind, their cache, and the ones that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import references
from shd_diffusion.evaluation.extractors import Extractor, load_extractor
from shd_diffusion.evaluation.frechet import Statistics
from shd_diffusion.evaluation.references import open_reference, save_reference


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return load_extractor("digits-classifier")


def test_features_are_extracted_once(digits, extractor, monkeypatch, tmp_path):
    path = tmp_path / "some.npz"
    np.savez(path, arr_0=digits[0][:30].permute(0, 2, 3, 1).numpy(), arr_1=digits[1][:30].numpy())
    first = open_reference(path, extractor, 16)
    monkeypatch.setattr(references, "extract_features", lambda *_: pytest.fail("extracted again"))
    again = open_reference(path, extractor, 16)
    assert (again.source, again.count, again.image_size) == (str(path), 30, "8×8")
    assert torch.equal(again.features, first.features) and torch.equal(again.labels, digits[1][:30])
    np.savez(path, arr_0=digits[0][30:60].permute(0, 2, 3, 1).numpy())
    with pytest.raises(pytest.fail.Exception, match="extracted again"):
        open_reference(path, extractor, 16)


def test_a_resized_reference(digits, extractor, tmp_path):
    large = digits[0][:12].repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    np.savez(tmp_path / "large.npz", arr_0=large.permute(0, 2, 3, 1).numpy())
    resized = open_reference(tmp_path / "large.npz", extractor, 5, resize="box", size=8)
    assert torch.equal(resized.features, open_reference(digits[0][:12], extractor, 5).features)
    assert torch.equal(open_reference(large, extractor, 5, resize="box", size=8).features, resized.features)
    with pytest.raises(UserError, match=r"image 0: is 24×24, but `digits-classifier` takes 8×8 only"):
        open_reference(tmp_path / "large.npz", extractor, 5)
    with pytest.raises(UserError, match=r"is 16×16, but `digits-classifier` takes 8×8 only"):
        open_reference("digits", extractor, 5, resize="lanczos", size=16)


def test_a_statistics_file_stands_for_its_images(digits, extractor, tmp_path):
    images = open_reference(digits[0][:50], extractor, 16)
    save_reference(images, extractor, tmp_path / "own.safetensors")
    own = open_reference(str(tmp_path / "own.safetensors"), extractor, 16)
    assert own.sha256 == images.sha256
    assert torch.equal(own.statistics["features"].covariance, images.statistics["features"].covariance)


def test_statistics_of_another_extractor_are_refused(digits, extractor, tmp_path, monkeypatch):
    save_reference(open_reference(digits[0][:50], extractor, 16), extractor, tmp_path / "own.safetensors")
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(
        UserError, match=r"inception.npz: statistics of Inception features, but the images go through"
    ):
        open_reference(tmp_path / "inception.npz", extractor, 16)
    monkeypatch.setattr(extractor, "sha256", "0123456789ab" + 52 * "0")
    with pytest.raises(
        UserError, match=r"own.safetensors: statistics of `digits-classifier` \(weights .*0123456789ab"
    ):
        open_reference(tmp_path / "own.safetensors", extractor, 16)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(3)}, r"neither images `arr_0` nor statistics `mu` and `sigma` \(keys: mean\)"),
        ({"mu": np.zeros(3)}, "do not belong together; statistics need both"),
        ({"mu": np.zeros(3), "sigma": np.zeros((4, 4))}, "do not belong together; statistics need both"),
        ({"mu": np.zeros((2, 2)), "sigma": np.zeros((2, 2, 2, 2))}, "do not belong together"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "do not belong together"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(1)}, "not an .npz of plain arrays"),
    ],
)
def test_an_npz_without_a_reference_is_refused(arrays, message, extractor, tmp_path):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(UserError, match=message):
        open_reference(tmp_path / "reference.npz", extractor, 16)


@pytest.mark.parametrize("place", ["mean", "covariance", "features"])
def test_one_flipped_byte_in_the_cache_is_noticed(place, digits, extractor, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = open_reference(digits[0][:30], extractor, 16)
    (cached,) = (tmp_path / "shd-diffusion" / "references").iterdir()
    content = bytearray(cached.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    key = place if place == "features" else f"features/{place}"
    content[8 + length + header[key]["data_offsets"][0] + 3] ^= 1
    cached.write_bytes(content)
    again = open_reference(digits[0][:30], extractor, 16)
    assert torch.equal(again.statistics["features"].mean, first.statistics["features"].mean)
    assert torch.equal(again.statistics["features"].covariance, first.statistics["features"].covariance)
    assert torch.equal(again.features, first.features)
    assert f"{cached}: damaged, and computed anew" in capsys.readouterr().err
    open_reference(digits[0][:30], extractor, 16)
    assert "damaged" not in capsys.readouterr().err  # it was written anew
    (tmp_path / "given.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"given.safetensors: .*damaged \(other numbers than were written\)"):
        open_reference(tmp_path / "given.safetensors", extractor, 16)


@pytest.mark.parametrize("reference", ["{}", "[]", "5", "torn"])
def test_a_statistics_file_with_other_metadata_is_refused(reference, extractor, tmp_path):
    metadata = {"reference": reference, "checksum": "0" * 64}
    save_file({"features/mean": torch.zeros(3)}, tmp_path / "mean.safetensors", metadata)
    with pytest.raises(UserError, match=r"mean\.safetensors: not a file of reference statistics"):
        open_reference(tmp_path / "mean.safetensors", extractor, 16)


def test_one_image_is_no_reference(digits, extractor, tmp_path):
    np.savez(tmp_path / "one.npz", digits[0][:1].permute(0, 2, 3, 1).numpy())
    with pytest.raises(UserError, match=r"one\.npz: 1 reference images are too few; give 10 or more"):
        open_reference(tmp_path / "one.npz", extractor, 16)


def test_numbers_that_are_none_are_refused(digits, extractor, photographs, inception_weights, tmp_path):
    good = open_reference(digits[0][:30], extractor, 16)
    mean = good.statistics["features"].mean.clone()
    mean[5] = float("nan")
    broken = replace(good, statistics={"features": Statistics(mean, good.statistics["features"].covariance)})
    save_reference(broken, extractor, tmp_path / "nan.safetensors")
    with pytest.raises(UserError, match=r"nan\.safetensors: its statistics are not finite"):
        open_reference(tmp_path / "nan.safetensors", extractor, 16)

    sigma = np.eye(2048)
    sigma[7, 7] = np.inf
    np.savez(tmp_path / "inf.npz", mu=np.zeros(2048), sigma=sigma)
    inception = load_extractor("inception-v3-compat", inception_weights)
    with pytest.raises(UserError, match=r"inf\.npz: its statistics are not finite"):
        open_reference(tmp_path / "inf.npz", inception, 16)
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(192), sigma=np.eye(192))
    with pytest.raises(
        UserError, match=r"narrow\.npz: statistics of 192 features, but `inception-v3-compat` has 2048"
    ):
        open_reference(tmp_path / "narrow.npz", inception, 16)


def test_other_files_are_refused(extractor, tmp_path: Path):
    with pytest.raises(UserError, match=r"imagenet is no data set \(known: digits\)"):
        open_reference("imagenet", extractor, 16)
    save_file({"mean": torch.zeros(3)}, tmp_path / "mean.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name in ("mean", "torn"):
        with pytest.raises(UserError, match=f"{name}.safetensors: not a file of reference statistics"):
            open_reference(tmp_path / f"{name}.safetensors", extractor, 16)
