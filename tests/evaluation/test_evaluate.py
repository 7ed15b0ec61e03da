"""The evaluation of a set of images, from the images to the figures with their protocol."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import evaluate_run, load_extractor, watch_fid
from shd_diffusion.evaluation.fid import Statistics
from shd_diffusion.evaluation.references import open_reference, save_reference

ROOT = Path(__file__).parents[2]
ALL_METRICS = ["fid", "is", "kid", "prc", "prc-adm", "dc", "fid-infinity", "per-class"]


def noisy(images: torch.Tensor, strength: int) -> torch.Tensor:
    noise = torch.randint(-strength, strength + 1, images.shape, generator=torch.Generator().manual_seed(0))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def good(digits) -> dict:
    """Every figure of half of the digits against all of them."""
    images, labels = digits
    config = EvaluateConfig(metrics=ALL_METRICS, bootstrap=20)
    return evaluate_run(images[::2], "digits", config, labels[::2].tolist(), {"seed": 3})


def test_noise_makes_every_figure_worse(good, digits):
    images, labels = digits
    config = EvaluateConfig(metrics=ALL_METRICS)
    bad = evaluate_run(noisy(images[::2], 90), "digits", config, labels[::2].tolist())
    for figure in ("fid", "fid_infinity", "kid_mean"):
        assert good[figure] < bad[figure]
    for figure in (
        "precision",
        "precision_adm",
        "density",
        "coverage",
        "inception_score_mean",
        "label_accuracy",
    ):
        assert good[figure] > bad[figure]
    assert good["per_class_fid"].keys() == set("0123456789")
    assert all(good["per_class_fid"][label] < bad["per_class_fid"][label] for label in "0123456789")


def test_samples_that_are_in_the_reference_lie_on_its_manifold(good):
    assert good["precision"] == 1.0 and good["label_accuracy"] > 0.97
    assert good["fid_interval"][0] < good["fid"] < good["fid_interval"][1]
    assert (
        good["inception_score_interval"][0]
        < good["inception_score_mean"]
        < good["inception_score_interval"][1]
    )


def test_the_figures_carry_their_protocol(good):
    protocol = good["protocol"]
    assert protocol["name"] == "FID on digits-classifier features"
    assert (
        protocol["seed"] == 3 and protocol["num_images"] == 899 and protocol["num_reference_images"] == 1797
    )
    assert protocol["kid"] == "100 subsets of 449"
    assert len(protocol["extractor_sha256"]) == len(protocol["reference_sha256"]) == 64
    assert protocol["extractor_accuracy"] > 0.97
    assert json.loads(json.dumps(good))["protocol"] == protocol
    assert all(math.isfinite(value) for value in good.values() if isinstance(value, float))


def test_a_folder_of_images_and_few_of_them(digits, tmp_path):
    images, _ = digits
    for index, image in enumerate(images[:24]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{index:06d}.png")
    found = evaluate_run(tmp_path, "digits", EvaluateConfig())
    assert found["fid"] == evaluate_run(images[:24], "digits", EvaluateConfig())["fid"]
    assert found["warnings"] == [
        "24 images are too few for 64 features: their covariance is singular and the FID biased upwards"
    ]
    assert "label_accuracy" not in found


@torch.no_grad()
def test_watching_equals_the_evaluation_and_torchmetrics(digits):
    images, _ = digits
    samples, reference = images[:400], images[400:]
    extractor = load_extractor("digits-classifier")
    watched = watch_fid(samples, open_reference(reference, extractor, 100).statistics["features"], extractor)
    assert watched == pytest.approx(evaluate_run(samples, reference, EvaluateConfig())["fid"], rel=1e-9)
    theirs = FrechetInceptionDistance(extractor, input_img_size=(3, 8, 8), antialias=False)
    theirs.update(samples, real=False)
    theirs.update(reference, real=True)
    assert watched == pytest.approx(theirs.compute().item(), rel=1e-4)


def test_a_reference_that_is_too_small_or_of_other_features_is_refused(digits, tmp_path):
    images, _ = digits
    with pytest.raises(UserError, match="3 reference images are too few; give 10 or more"):
        evaluate_run(images[:20], images[:3], EvaluateConfig())
    published = open_reference(images[:40], load_extractor("digits-classifier"), 100)
    narrow = {
        role: Statistics(s.mean[:7], s.covariance[:7, :7].clone()) for role, s in published.statistics.items()
    }
    save_reference(replace(published, statistics=narrow, features=None), load_extractor("digits-classifier"),
                   tmp_path / "narrow.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="statistics of 7 features, but `digits-classifier` has 64"):
        evaluate_run(images[:20], str(tmp_path / "narrow.safetensors"), EvaluateConfig())


def test_what_cannot_be_evaluated_is_refused(digits, tmp_path):
    images, _ = digits
    with pytest.raises(UserError, match="9 images are too few; sample 10 or more"):
        evaluate_run(images[:9], "digits", EvaluateConfig())
    with pytest.raises(UserError, match="`sfid` needs spatial Inception features"):
        evaluate_run(images[:20], "digits", EvaluateConfig(metrics=["sfid"]))
    with pytest.raises(UserError, match="`per-class` needs labels on both sides"):
        evaluate_run(images[:20], "digits", EvaluateConfig(metrics=["per-class"]))
    for index, size in enumerate([8] * 11 + [9]):
        Image.fromarray(np.zeros((size, size), np.uint8)).save(tmp_path / f"{index:06d}.png")
    with pytest.raises(UserError, match=r"000011.png: is 9×9, but .*000000.png is 8×8"):
        evaluate_run(tmp_path, "digits", EvaluateConfig())
    with pytest.raises(UserError, match="1 labels for 20 images"):
        evaluate_run(images[:20], "digits", EvaluateConfig(), labels=[1])


TWO = """
import sys
import torch
from shd_diffusion.data.digits import digits_uint8
from shd_diffusion.evaluation.extractors import load_extractor
from shd_diffusion.evaluation.features import extract_features
from shd_diffusion.evaluation.images import tensor_images
from shd_diffusion.processes import processes

images = tensor_images(digits_uint8()[0][:101].expand(-1, 3, -1, -1), "digits")
features = extract_features(images, load_extractor("digits-classifier"), 16, "digits")["features"]
assert processes().num_processes == 2
torch.save(features, f"{sys.argv[1]}/{processes().process_index}.pt")
processes().destroy_process_group()
"""


def test_two_processes_extract_what_one_does(digits, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        tmp_path,
    ]
    done = subprocess.run(
        launch,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in (0, 1))
    assert torch.equal(first, second)
    with torch.no_grad():
        torch.testing.assert_close(first, load_extractor("digits-classifier")(digits[0][:101]))
