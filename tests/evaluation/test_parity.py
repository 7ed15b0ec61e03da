"""The metrics equal torch-fidelity's own on the same images, with Inception's network and random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from torch import Tensor

from shd_diffusion.config import EvaluateConfig
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import compute_metrics
from shd_diffusion.evaluation.extractors import Extractor, load_extractor
from shd_diffusion.evaluation.features import extract_features
from shd_diffusion.evaluation.images import tensor_images
from shd_diffusion.evaluation.references import Reference, open_reference


class Images(torch.utils.data.Dataset):
    """What torch-fidelity takes as a set of images."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


@pytest.fixture(scope="module")
def config(inception_weights: Path) -> EvaluateConfig:
    return EvaluateConfig(
        extractor="inception-v3-compat",
        extractor_weights=str(inception_weights),
        metrics=["fid", "is", "kid", "prc"],
        batch_size=7,
    )


@pytest.fixture(scope="module")
def metrics(photographs: tuple[Tensor, Tensor], config: EvaluateConfig) -> dict:
    return compute_metrics(*photographs, config)


@pytest.fixture(scope="module")
def extractor(inception_weights: Path) -> Extractor:
    return load_extractor("inception-v3-compat", inception_weights)


@pytest.fixture(scope="module")
def reference(photographs: tuple[Tensor, Tensor], extractor: Extractor, metrics: dict) -> Reference:
    """The reference that `metrics` were computed against, from the cache."""
    return open_reference(photographs[1], extractor, 7)


def test_metrics_equal_those_of_calculate_metrics(metrics, photographs, inception_weights):
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(photographs[0]),
        input2=Images(photographs[1]),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=6,
        batch_size=7,
        cuda=False,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    names = {
        "fid": "frechet_inception_distance",
        "inception_score_mean": "inception_score_mean",
        "inception_score_std": "inception_score_std",
        "kid_mean": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    assert metrics["protocol"]["kid"] == "100 subsets of 6"
    assert {name: metrics[name] for name in names} == {
        name: pytest.approx(theirs[theirs_name], rel=1e-6) for name, theirs_name in names.items()
    }
    assert metrics["fid"] > 1 and metrics["kid_mean"] > 0  # weights under which the metrics mean something


def test_few_samples_are_a_warning(metrics):
    assert "12 images are too few for 2048 features" in metrics["warnings"][0]
    assert "14 reference images are too few" in metrics["warnings"][1]


def test_spatial_features_are_seven_channels_of_mixed_6_conv_channels_last(photographs, extractor):
    images = photographs[0][:2]
    spatial = extractor.roles(images)["spatial"]
    network = extractor.network
    kept = []
    hook = network.Mixed_6c.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    network(images)
    hook.remove()
    convolution = network.Mixed_6d.branch1x1  # TensorFlow's `mixed_6/conv`, with batch norm and ReLU
    with torch.no_grad():
        channels = convolution.bn(convolution.conv(kept[0])).relu()
    assert spatial.shape == (2, 2023)
    for row, column, channel in ((0, 0, 0), (0, 1, 2), (3, 0, 6), (16, 16, 6)):
        place = (row * 17 + column) * 7 + channel
        torch.testing.assert_close(spatial[:, place], channels[:, channel, row, column])


def test_statistics_of_an_npz_equal_those_of_its_images(photographs, reference, extractor, config, tmp_path):
    path = tmp_path / "reference.npz"
    images = photographs[1].permute(0, 2, 3, 1).numpy()
    np.savez(path, arr_0=images)
    assert_same_statistics(open_reference(path, extractor, 7), reference)

    arrays = {}
    for role, suffix in (("features", ""), ("spatial", "_s")):
        statistics = reference.statistics[role]
        arrays |= {f"mu{suffix}": statistics.mean.numpy(), f"sigma{suffix}": statistics.covariance.numpy()}
    np.savez(path, **arrays)
    published = open_reference(path, extractor, 7)
    assert_same_statistics(published, reference)
    assert published.features is None
    usual = compute_metrics(photographs[0], path, config.model_copy(update={"metrics": None}))
    assert {"fid", "sfid", "inception_score_mean"} <= usual.keys() and "kid_mean" not in usual
    wanted = config.model_copy(update={"metrics": ["fid", "kid"]})
    with pytest.raises(UserError, match="`kid` needs reference images"):
        compute_metrics(photographs[0], path, wanted)


def assert_same_statistics(first: Reference, second: Reference) -> None:
    for role, statistics in second.statistics.items():
        torch.testing.assert_close(first.statistics[role].mean, statistics.mean)
        torch.testing.assert_close(first.statistics[role].covariance, statistics.covariance)


def test_batches_do_not_matter(photographs, extractor):
    images = tensor_images(photographs[0][:3], "images")
    one, three = (extract_features(images, extractor, size, "images")["features"] for size in (1, 3))
    torch.testing.assert_close(one, three)
