"""Class folders of images are matched with the reference's by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import compute_metrics

NAMED = EvaluateConfig(extractor="digits-classifier", metrics=["fid", "accuracy", "per-class"])


def class_folders(digits, folder: Path, names: dict[int, str], each: int = 20) -> Path:
    images, labels = digits
    for label, name in names.items():
        (folder / name).mkdir(parents=True)
        for index in (labels == label).nonzero()[:each, 0].tolist():
            Image.fromarray(images[index, 0].numpy()).save(folder / name / f"{index:06d}.png")
    return folder


@pytest.fixture(scope="module")
def real(digits, tmp_path_factory) -> Path:
    return class_folders(digits, tmp_path_factory.mktemp("real"), {n: f"digit{n}" for n in range(10)})


def test_some_of_the_classes_are_matched_by_name(digits, real, tmp_path):
    """Images of the reference itself: each class lies at distance 0 from its own, and is recognised."""
    images = class_folders(digits, tmp_path, {3: "digit3", 7: "digit7"})
    found = compute_metrics(images, real, NAMED)
    assert found["label_accuracy"] > 0.95
    assert found["per_class_fid"] == pytest.approx({"3": 0, "7": 0}, abs=1e-3)
    again = compute_metrics(images, real, NAMED)  # the reference comes from the cache
    assert again["per_class_fid"] == found["per_class_fid"]


def test_numbers_are_names_of_classes_without_any(digits, tmp_path):
    images = class_folders(digits, tmp_path / "images", {3: "3", 7: "7"})
    assert compute_metrics(images, "digits", NAMED)["per_class_fid"].keys() == {"3", "7"}
    np.savez(
        tmp_path / "some.npz", arr_0=digits[0][:60].permute(0, 2, 3, 1).numpy(), arr_1=digits[1][:60].numpy()
    )
    assert compute_metrics(images, tmp_path / "some.npz", NAMED)["per_class_fid"].keys() == {"3", "7"}


def test_a_folder_that_is_no_class_of_the_reference_is_refused_or_left_out(digits, real, tmp_path):
    images = class_folders(digits, tmp_path, {3: "digit3", 7: "seven"})
    why = rf"{tmp_path}: the folder `seven` is no class of the reference {real} \(digit0, digit1, digit2, digit3, ...\)"
    with pytest.raises(UserError, match=f"^{why}; rename it, or leave out `accuracy`, `per-class`$"):
        compute_metrics(images, real, NAMED)
    found = compute_metrics(images, real, EvaluateConfig(extractor="digits-classifier"))
    assert "label_accuracy" not in found and "fid" in found
    assert found["warnings"][0].startswith(f"`accuracy` left out: {tmp_path}: the folder `seven` is no class")
    distance = NAMED.model_copy(update={"metrics": ["fid"]})
    assert not any("left out" in warning for warning in compute_metrics(images, real, distance)["warnings"])


def test_labels_of_samples_are_the_data_sets_own_numbers(digits, real, tmp_path):
    images = class_folders(digits, tmp_path, {3: "a", 7: "b"})
    labels = [3] * 20 + [7] * 20
    assert compute_metrics(images, real, NAMED, labels)["per_class_fid"].keys() == {"3", "7"}
    flat = real / "digit3"  # without classes: the folders are numbered in their order
    accuracy = NAMED.model_copy(update={"metrics": ["accuracy"]})
    assert compute_metrics(images, flat, accuracy)["label_accuracy"] < 0.5
    assert compute_metrics(images, flat, accuracy, labels)["label_accuracy"] > 0.95
