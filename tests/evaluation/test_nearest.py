"""The real images that samples resemble most: distances, which they are, and what is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.evaluation import compute_metrics, load_extractor
from shd_diffusion.evaluation.features import extract_features
from shd_diffusion.evaluation.images import tensor_images
from shd_diffusion.evaluation.nearest import nearest, write_nearest
from shd_diffusion.evaluation.references import open_reference, save_reference


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_the_nearest_are_those_of_all_distances(chunk):
    generator = torch.Generator().manual_seed(0)
    queries, references = torch.randn(5, 33, generator=generator), torch.randn(23, 33, generator=generator)
    references[11] = queries[2] + 1e-5  # far below what the difference of large squares can tell
    distances, indices = nearest(queries, references, 4, chunk)
    every = cdist(queries.double(), references.double())
    expected = every.argsort(axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(distances, np.take_along_axis(every, expected, axis=1), rtol=2e-3)
    np.testing.assert_allclose(np.delete(distances, 2, 0), np.delete(np.sort(every)[:, :4], 2, 0), rtol=1e-5)


def test_fewer_references_than_wanted_are_all_returned():
    distances, indices = nearest(torch.zeros(1, 2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]), 4)
    assert distances.tolist() == [[1.0, 5.0]] and indices.tolist() == [[1, 0]]


def test_samples_that_were_learnt_by_heart_are_seen(digits, tmp_path):
    """Every other sample is a digit of the reference, moved by one grey level; the others are of no such kind."""
    images, labels = digits
    samples = 255 - images[:64]
    samples[::2] = images[100:164:2] ^ 1
    reference = images[100:400]
    config = EvaluateConfig(extractor="digits-classifier", metrics=["fid"])
    compute_metrics(samples, reference, config, labels[100:164].tolist(), nearest=tmp_path / "nearest.json")
    found = json.loads((tmp_path / "nearest.json").read_text())
    assert (found["reference"], found["num_reference_images"]) == ("images", 300)
    assert [entry["index"] for entry in found["samples"]] == [0, 9, 18, 27, 36, 45, 54, 63]
    picture = np.asarray(Image.open(tmp_path / "nearest.png"))
    assert picture.shape == (8 * 8, 5 * 8, 3)
    for row, entry in enumerate(found["samples"]):
        assert entry["label"] == labels[100 + entry["index"]]
        distances = [each["distance"] for each in entry["nearest"]]
        assert distances == sorted(distances) and len(distances) == 4
        first = entry["nearest"][0]
        if entry["index"] % 2 == 0:
            assert first["index"] == entry["index"] and first["name"] == f"reference: image {entry['index']}"
            assert first["distance"] < 0.1 * entry["spacing"]
        else:
            assert first["distance"] > 0.5 * entry["spacing"]
        shown = [samples[entry["index"]], *(reference[each["index"]] for each in entry["nearest"])]
        expected = torch.cat(shown, dim=2).permute(1, 2, 0)
        np.testing.assert_array_equal(picture[8 * row : 8 * row + 8], expected)


def test_the_measure_is_the_distance_between_real_images(digits, tmp_path):
    extractor = load_extractor("digits-classifier")
    reference = open_reference("digits", extractor, 100)
    samples = tensor_images(digits[0][5:6], "images")
    features = extract_features(samples, extractor, 100, "images")["features"]
    write_nearest(tmp_path / "nearest.json", samples, features, None, reference)
    (entry,) = json.loads((tmp_path / "nearest.json").read_text())["samples"]
    every = np.sort(cdist(features.double(), reference.features.double()))[0]
    assert (entry["label"], entry["nearest"][0]["index"], entry["nearest"][0]["label"]) == (None, 5, 5)
    assert (entry["nearest"][0]["distance"], entry["spacing"]) == pytest.approx(
        (0, every[1]), rel=1e-5, abs=1e-4
    )


def test_neighbours_of_another_size_are_brought_to_the_samples(digits, tmp_path):
    extractor = load_extractor("digits-classifier")
    reference = open_reference(digits[0][:20], extractor, 100)
    samples = tensor_images(digits[0][:2].repeat_interleave(2, dim=2), "images")
    write_nearest(tmp_path / "nearest.json", samples, reference.features[:2], None, reference)
    picture = np.asarray(Image.open(tmp_path / "nearest.png"))
    assert picture.shape == (2 * 16, 5 * 8, 3)
    np.testing.assert_array_equal(picture[:16, :8], samples[0].permute(1, 2, 0))
    assert np.corrcoef(picture[:16, 8:16].ravel(), picture[:16, :8].ravel())[0, 1] > 0.9


def test_statistics_without_images_leave_a_note(digits, tmp_path):
    extractor = load_extractor("digits-classifier")
    save_reference(open_reference("digits", extractor, 100), extractor, tmp_path / "digits.safetensors")
    (tmp_path / "nearest.png").write_bytes(b"of an evaluation before")
    compute_metrics(
        digits[0][:20],
        tmp_path / "digits.safetensors",
        EvaluateConfig(extractor="digits-classifier", metrics=["fid"]),
        nearest=tmp_path / "nearest.json",
    )
    found = json.loads((tmp_path / "nearest.json").read_text())
    assert "without images" in found["note"] and "samples" not in found
    assert not (tmp_path / "nearest.png").exists()
