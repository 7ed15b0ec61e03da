"""The evaluation of a set of images."""

from __future__ import annotations

import math

import pytest
import torch

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.data.digits import digits_uint8
from shd_diffusion.evaluation import evaluate_run, load_extractor, watch_fid


@pytest.fixture(scope="module")
def digits():
    images, labels = digits_uint8()
    return images.expand(-1, 3, -1, -1), labels


def test_real_digits_score_better_than_noisy_ones(digits):
    images, labels = digits
    half, half_labels = images[::2], labels[::2].tolist()
    noise = torch.randint(-60, 61, half.shape, generator=torch.Generator().manual_seed(0))
    noisy = (half.int() + noise).clamp(0, 255).to(torch.uint8)
    good = evaluate_run(half, "digits", EvaluateConfig(), half_labels)
    bad = evaluate_run(noisy, "digits", EvaluateConfig(), half_labels)
    assert good["fid"] < bad["fid"] and good["kid_mean"] < bad["kid_mean"]
    assert good["precision"] == 1.0 and good["label_accuracy"] > 0.97 > bad["label_accuracy"] - 0.1
    assert all(
        math.isfinite(good[key])
        for key in ("inception_score_mean", "inception_score_std", "kid_std", "recall")
    )
    assert good["protocol"]["name"] == "FID on digits-classifier features"
    assert good["warnings"] == []


def test_watching_equals_the_evaluation(digits):
    images, _ = digits
    samples, reference = images[:400], images[400:]
    watched = watch_fid(samples, reference, load_extractor("digits-classifier"))
    assert watched == pytest.approx(evaluate_run(samples, reference, EvaluateConfig())["fid"], rel=1e-4)
