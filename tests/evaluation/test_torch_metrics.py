"""The metrics as objects: against `evaluate`, against torchmetrics' own, and by two processes."""

from __future__ import annotations

import pytest
import torch
from forks import launch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.evaluation import compute_metrics, torch_metrics
from shd_diffusion.evaluation.cmmd import cmmd
from shd_diffusion.evaluation.extractors import load_extractor
from shd_diffusion.evaluation.frechet import Statistics, feature_statistics
from shd_diffusion.evaluation.inception_score import inception_score
from shd_diffusion.evaluation.kid import kernel_distance
from shd_diffusion.evaluation.metrics import METRICS
from shd_diffusion.evaluation.torch_metrics import (
    CMMD,
    DensityCoverage,
    FeatureMetric,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    MongeDistance,
    PrecisionRecall,
)

DIGITS = EvaluateConfig(extractor="digits-classifier")
CLASSES = {
    "fid": FrechetDistance,
    "kid": KernelDistance,
    "mind": MongeDistance,
    "prc": PrecisionRecall,
    "dc": DensityCoverage,
    "is": InceptionScore,
}


class Features(nn.Module):
    """An "extractor" whose images are features already."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return images


@pytest.fixture(scope="module")
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator)
    return tuple(torch.randn(n, 12, generator=generator) @ mixing + shift for n, shift in ((90, 0), (70, 1)))


def test_they_compute_what_evaluate_does(digits):
    images, _ = digits
    samples, reference = images[:150], images[150:400]
    expected = compute_metrics(samples, reference, DIGITS.model_copy(update={"metrics": list(CLASSES)}))
    extractor = load_extractor("digits-classifier")
    together = MetricCollection({name: kind(extractor) for name, kind in CLASSES.items()}).train()
    for batch in reference.split(64):
        together.update(batch, real=True)
    for batch in samples.split(37):
        together.update(batch, real=False)
    found = together.compute()
    shared = {frozenset(group) for group in together.compute_groups.values()}
    assert frozenset({"kid", "mind", "prc", "dc"}) in shared  # whose features are extracted once
    for name in CLASSES:
        keys = [key for each in METRICS[name].columns for key in (each.key, each.deviation) if key]
        values = found[name] if isinstance(found[name], tuple) else (found[name],)
        for key, value in zip(keys, values, strict=True):
            # features of other batches: float32
            assert value.dtype == torch.float64 and value.item() == pytest.approx(expected[key], rel=1e-4), (
                key
            )


def test_every_metric_of_features_alone_has_one():
    kinds = {kind.metric.name: kind for kind in FeatureMetric.__subclasses__()}
    assert kinds.keys() | {"fid"} == CLASSES.keys() | {"cmmd"}
    for name, kind in kinds.items():
        assert METRICS[name] is kind.metric
        better = {column.better for column in kind.metric.columns}
        assert better == {"higher" if kind.higher_is_better else "lower"}


def test_the_frechet_distance_is_that_of_torchmetrics(features):
    theirs = FrechetInceptionDistance(Features(), input_img_size=(12,)).set_dtype(torch.float64)
    ours = FrechetDistance(Features())
    for metric in (theirs, ours):
        for real, side in zip((False, True), features, strict=True):
            for part in side.split(32):
                metric.update(part, real=real)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_the_kernel_distance_is_that_of_torchmetrics(features):
    """Of whole sets, since random subsets differ."""
    sides = features[0][:70], features[1]
    theirs = KernelInceptionDistance(Features(), subsets=1, subset_size=70)
    for real, side in zip((False, True), sides, strict=True):
        theirs.update(side.double(), real=real)
    expected, _ = theirs.compute()
    assert kernel_distance(*sides, size=70)[0] == pytest.approx(expected.item(), rel=1e-6)


def test_of_a_clip_model(features):
    metric = CMMD(Features())
    for real, side in zip((False, True), features, strict=True):
        metric.update(side, real)
    expected = cmmd(*features)
    assert metric.compute().item() == expected


def test_real_images_stay_or_are_given_as_statistics(features):
    generated, real = features
    kept = [kind(Features(), reset_real_features=False) for kind in (FrechetDistance, MongeDistance)]
    given = FrechetDistance(Features(), reference=feature_statistics(real))
    for metric in kept:
        metric.update(real, real=True)
    for metric in (*kept, given):
        metric.update(generated, real=False)
    first = [metric.compute().item() for metric in (*kept, given)]
    for metric in (*kept, given):
        metric.reset()
        metric.update(generated[:40], real=False)
    second = [metric.compute().item() for metric in (*kept, given)]
    for values in (first, second):
        assert values[0] == pytest.approx(values[2], rel=1e-10)
    assert first[0] != second[0] and first[1] != second[1]
    forgetful = FrechetDistance(Features())
    forgetful.update(real, real=True)
    forgetful.reset()
    forgetful.update(generated, real=False)
    with pytest.raises(ValueError, match="2 samples or more, not 0"):
        forgetful.compute()


def test_the_reference_may_be_on_another_device_than_the_images(features, monkeypatch):
    """As in validation on an accelerator; the meta device stands in for the other one."""
    met = []

    def distance(generated, reference):
        met.append({each.device.type for side in (generated, reference) for each in vars(side).values()})
        return 0.0

    monkeypatch.setattr(torch_metrics, "frechet_distance", distance)
    real = feature_statistics(features[1])
    given = FrechetDistance(
        Features(), reference=Statistics(real.mean.to("meta"), real.covariance.to("meta"))
    )
    given.update(features[0], real=False)
    given.compute()
    assert met == [{"meta"}]


def test_the_inception_score_heeds_no_real_images():
    logits = 3 * torch.randn(60, 7, generator=torch.Generator().manual_seed(0))
    metric = InceptionScore(Features())
    metric.update(torch.zeros(9, 7), real=True)
    metric.update(logits, real=False)
    mean, deviation = metric.compute()
    assert (mean.item(), deviation.item()) == inception_score(logits)


def test_what_cannot_be_computed_is_told(digits, features):
    metric = FrechetDistance("digits-classifier", reference=feature_statistics(torch.rand(99, 64)))
    with pytest.raises(ValueError, match="takes no real images"):
        metric.update(digits[0][:9], real=True)
    with pytest.raises(
        ValueError, match=r"`digits-classifier` takes 8-bit images \(N, 3, H, W\), not torch.float32"
    ):
        metric.update(digits[0][:9] / 255, real=False)
    kernel = KernelDistance(Features())
    kernel.update(features[0], real=False)
    with pytest.raises(ValueError, match="KernelDistance compares generated with real images"):
        kernel.compute()


# The second process has no image of the last part, and so an uneven number of them.
TWO = """
import sys
import torch
from shd_diffusion.evaluation.torch_metrics import FrechetDistance, InceptionScore, KernelDistance, MongeDistance
from shd_diffusion.processes import processes
from torch import nn

class Features(nn.Module):
    num_features = 12

    def forward(self, images):
        return images

state = processes()
assert state.num_processes == 2
parts = torch.load(f"{sys.argv[1]}/features.pt", weights_only=True)
found = {}
for kind in (FrechetDistance, KernelDistance, MongeDistance, InceptionScore):
    metric = kind(Features())
    for real, side in zip((False, True), parts):
        for part in side.split(32)[state.process_index :: 2]:
            metric.update(part, real=real)
    found[kind.__name__] = metric.compute()
    metric.update(parts[0], real=False)  # each has its own again
    assert not metric._is_synced
empty = KernelDistance(Features())
if state.is_main_process:
    for real, side in zip((False, True), parts):
        empty.update(side, real=real)
found["empty"] = empty.compute()
torch.save(found, f"{sys.argv[1]}/{state.process_index}.pt")
state.destroy_process_group()
"""


def test_two_processes_compute_what_one_does(features, tmp_path):
    torch.save(features, tmp_path / "features.pt")
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launch(2, script, tmp_path)
    first, second = (torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in (0, 1))
    assert first == second
    in_turns = [
        torch.cat([part for process in (0, 1) for part in side.split(32)[process::2]]) for side in features
    ]
    for kind in (FrechetDistance, KernelDistance, MongeDistance, InceptionScore):
        metric = kind(Features())
        for real, side in zip((False, True), in_turns, strict=True):
            metric.update(side, real=real)
        alone, together = metric.compute(), first[kind.__name__]
        pairs = zip(alone, together, strict=True) if isinstance(alone, tuple) else [(alone, together)]
        for ours, theirs in pairs:
            assert theirs.item() == pytest.approx(ours.item(), rel=1e-10)
    whole = kernel_distance(*features)
    assert tuple(value.item() for value in first["empty"]) == whole
