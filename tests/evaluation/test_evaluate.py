"""The evaluation of a set of images, from the images to the metrics with their protocol."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import launch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.image.fid import FrechetInceptionDistance

from shd_diffusion.config import EvaluateConfig, read_run_config
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import compute_metrics, extractor_name, load_extractor
from shd_diffusion.evaluation.classifiers import trained_classifier
from shd_diffusion.evaluation.evaluate_run import evaluate_images, evaluate_run
from shd_diffusion.evaluation.frechet import Statistics
from shd_diffusion.evaluation.metric import Column, Metric
from shd_diffusion.evaluation.metrics import METRICS
from shd_diffusion.evaluation.references import open_reference, save_reference
from shd_diffusion.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
ALL_METRICS = ["fid", "is", "kid", "prc", "dc", "fid-infinity", "per-class", "accuracy"]
DIGITS = EvaluateConfig(extractor="digits-classifier")


def noisy(images: torch.Tensor, strength: int) -> torch.Tensor:
    noise = torch.randint(-strength, strength + 1, images.shape, generator=torch.Generator().manual_seed(0))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def good(digits) -> dict:
    """Every metric of half of the digits against all of them."""
    images, labels = digits
    config = EvaluateConfig(metrics=ALL_METRICS)
    return compute_metrics(images[::2], "digits", config, labels[::2].tolist(), {"seed": 3})


def test_noise_makes_every_metric_worse(good, digits):
    images, labels = digits
    config = EvaluateConfig(metrics=ALL_METRICS)
    bad = compute_metrics(noisy(images[::2], 90), "digits", config, labels[::2].tolist())
    for metric in ("fid", "fid_infinity", "kid_mean"):
        assert good[metric] < bad[metric]
    for metric in (
        "precision",
        "density",
        "coverage",
        "inception_score_mean",
        "label_accuracy",
    ):
        assert good[metric] > bad[metric]
    assert good["per_class_fid"].keys() == set("0123456789")
    assert all(good["per_class_fid"][label] < bad["per_class_fid"][label] for label in "0123456789")


def test_samples_that_are_in_the_reference_lie_on_its_manifold(good):
    assert good["precision"] == 1.0 and good["label_accuracy"] > 0.97


def test_the_metrics_carry_their_protocol(good):
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
    found = compute_metrics(tmp_path, "digits", DIGITS)
    assert found["fid"] == compute_metrics(images[:24], "digits", DIGITS)["fid"]
    assert found["warnings"] == [
        "24 images are too few for 64 features: their covariance is singular and the FID biased upwards"
    ]
    assert "label_accuracy" not in found
    assert "fid" not in compute_metrics(images[:3], None, DIGITS.model_copy(update={"metrics": []}))


@torch.no_grad()
def test_the_fid_equals_that_of_torchmetrics(digits):
    images, _ = digits
    samples, reference = images[:400], images[400:]
    extractor = load_extractor("digits-classifier")
    independent = FrechetInceptionDistance(extractor, input_img_size=(3, 8, 8), antialias=False)
    independent.update(samples, real=False)
    independent.update(reference, real=True)
    fid = compute_metrics(samples, reference, DIGITS)["fid"]
    assert fid == pytest.approx(independent.compute().item(), rel=1e-4)


def test_a_reference_that_is_too_small_or_of_other_features_is_refused(digits, tmp_path):
    images, _ = digits
    with pytest.raises(UserError, match="3 reference images are too few; give 10 or more"):
        compute_metrics(images[:20], images[:3], DIGITS)
    published = open_reference(images[:40], load_extractor("digits-classifier"), 100)
    narrow = {
        role: Statistics(s.mean[:7], s.covariance[:7, :7].clone()) for role, s in published.statistics.items()
    }
    save_reference(replace(published, statistics=narrow, features=None), load_extractor("digits-classifier"),
                   tmp_path / "narrow.safetensors")  # fmt: skip
    with pytest.raises(UserError, match="statistics of 7 features, but `digits-classifier` has 64"):
        compute_metrics(images[:20], str(tmp_path / "narrow.safetensors"), DIGITS)


def test_what_cannot_be_evaluated_is_refused(digits, tmp_path):
    images, _ = digits
    with pytest.raises(UserError, match="9 images are too few; sample 10 or more"):
        compute_metrics(images[:9], "digits", DIGITS)
    with pytest.raises(UserError, match="`sfid` needs spatial Inception features"):
        compute_metrics(images[:20], "digits", EvaluateConfig(metrics=["sfid"]))
    with pytest.raises(UserError, match="`per-class` needs labels of the images"):
        compute_metrics(images[:20], "digits", EvaluateConfig(metrics=["per-class"]))
    for index, size in enumerate([8] * 11 + [9]):
        Image.fromarray(np.zeros((size, size), np.uint8)).save(tmp_path / f"{index:06d}.png")
    with pytest.raises(UserError, match=r"000011.png: is 9×9, but .*000000.png is 8×8"):
        compute_metrics(tmp_path, "digits", DIGITS)
    with pytest.raises(UserError, match="1 labels for 20 images"):
        compute_metrics(images[:20], "digits", EvaluateConfig(), labels=[1])


def test_features_that_are_not_finite_are_refused(digits, tmp_path):
    state = load_file(trained_classifier("digits-classifier"))
    state["body.7.bias"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    config = EvaluateConfig(
        extractor="digits-classifier",
        extractor_weights=str(tmp_path / "nan.safetensors"),
        metrics=["fid", "prc"],
    )
    with pytest.raises(
        UserError, match=r"image 0: its features by `digits-classifier` are not finite, as of 30"
    ):
        compute_metrics(digits[0][:20], digits[0][:30], config)


def test_a_metric_that_is_not_finite_is_refused(digits, monkeypatch):
    broken = Metric("broken", lambda _: math.nan, (Column("broken", "Broken", "B", "lower"),))
    monkeypatch.setitem(METRICS, "broken", broken)
    config = EvaluateConfig(extractor="digits-classifier", metrics=["broken"])
    with pytest.raises(UserError, match=r"evaluate\.metrics: `broken` is not a finite number"):
        compute_metrics(digits[0][:20], "digits", config)


def test_the_data_set_decides_on_the_extractor(digits, monkeypatch):
    assert (
        compute_metrics(digits[0][:20], "digits", EvaluateConfig())["protocol"]["features"]
        == "digits-classifier"
    )
    names = [
        extractor_name(None, data) for data in ("digits", "fashion_mnist", "cifar10", "image_folder", None)
    ]
    assert names == ["digits-classifier", "fashion-mnist-classifier"] + 3 * ["inception-v3-compat"]
    assert extractor_name("dinov2-vit-s-14", "digits") == "dinov2-vit-s-14"


def samples_of_a_run(images: torch.Tensor, finished: int, path: Path) -> RunFolder:
    """A run of digits whose `sampling.json` knows of fewer images than there are files."""
    run = RunFolder(path)
    run.samples.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(run.samples / f"{index:06d}.png")
    record = {
        "num_images": finished,
        "labels": [index % 10 for index in range(finished)],
        "protocol": {"seed": 0},
    }
    (run.samples / "sampling.json").write_text(json.dumps(record))
    return run


def test_an_interrupted_sampling_leaves_what_was_finished_before(digits, tmp_path):
    """16 images, then 64 that were interrupted at 21."""
    run = samples_of_a_run(digits[0][:21], 16, tmp_path / "run")
    config = read_run_config(ROOT / "configs" / "digits" / "teacher.yaml")
    found = evaluate_run(run, config)
    of_sixteen = compute_metrics(digits[0][:16], "digits", DIGITS, [index % 10 for index in range(16)])
    for key in ("fid", "kid_mean", "inception_score_mean", "label_accuracy"):
        assert found[key] == of_sixteen[key]
    assert found["protocol"]["num_images"] == 16 and json.loads(run.evaluation_file.read_text()) == found
    assert evaluate_images(run.samples, ["evaluate.reference=digits"])["fid"] == found["fid"]
    (run.samples / "000003.png").unlink()
    with pytest.raises(UserError, match=r"000003\.png: not a readable image"):
        evaluate_run(run, config)


@pytest.mark.parametrize("content", ["[]", '{"num_images": 12, "labels": 5}', '{"num_images": "a"}'])
def test_a_damaged_record_of_samples_is_one_line(content, digits, tmp_path):
    run = samples_of_a_run(digits[0][:12], 12, tmp_path / "run")
    (run.samples / "sampling.json").write_text(content)
    with pytest.raises(UserError, match=r"sampling\.json: .*; delete the folder"):
        evaluate_run(run, read_run_config(ROOT / "configs" / "digits" / "teacher.yaml"))


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
    launch(2, script, tmp_path)
    first, second = (torch.load(tmp_path / f"{process}.pt", weights_only=True) for process in (0, 1))
    assert torch.equal(first, second)
    with torch.no_grad():
        torch.testing.assert_close(first, load_extractor("digits-classifier")(digits[0][:101]))


METRICS_OF_TWO = """
import json
import sys
from pathlib import Path
from shd_diffusion.config import EvaluateConfig
from shd_diffusion.data.digits import digits_uint8
from shd_diffusion.errors import UserError
from shd_diffusion.evaluation import compute_metrics, evaluate
from shd_diffusion.processes import processes

rank, config = processes().process_index, EvaluateConfig(extractor="digits-classifier")
images = digits_uint8()[0][:60].expand(-1, 3, -1, -1)
if rank:
    del evaluate._compute  # it does without
found = compute_metrics(images[:30], images[30:], config)
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))


def refuse(*_):
    raise UserError("not finite")


evaluate._compute = refuse
try:
    compute_metrics(images[:30], images[30:], config)
except UserError as error:
    assert str(error) == "not finite"
else:
    raise AssertionError
processes().destroy_process_group()
"""


def test_one_process_computes_for_all(digits, tmp_path):
    script = tmp_path / "metrics.py"
    script.write_text(METRICS_OF_TWO)
    launch(2, script, tmp_path)
    images = digits[0][:60].expand(-1, 3, -1, -1)
    expected = compute_metrics(images[:30], images[30:], DIGITS)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == expected.keys()
        assert found["fid"] == pytest.approx(expected["fid"], rel=1e-5)  # other batches, other kernels


HALF_KEPT = """
import os
import sys
from accelerate.utils import gather_object
from shd_diffusion.data.digits import digits_uint8
from shd_diffusion.evaluation.extractors import load_extractor
from shd_diffusion.evaluation.references import open_reference
from shd_diffusion.processes import processes

extractor, rank = load_extractor("digits-classifier"), processes().process_index
images = digits_uint8()[0][:40].expand(-1, 3, -1, -1)
if rank == 1:  # on another node, with a cache of its own that has nothing yet
    os.environ["XDG_CACHE_HOME"] = sys.argv[1]
reference = open_reference(images, extractor, 16)
assert gather_object([rank]) == [0, 1]  # all have gone through the same exchanges
assert reference.features.shape == (40, 64)
processes().destroy_process_group()
"""


def test_processes_of_which_some_have_the_reference_extract_it_together(digits, tmp_path):
    images = digits[0][:40].expand(-1, 3, -1, -1)
    open_reference(images, load_extractor("digits-classifier"), 16)
    script = tmp_path / "half.py"
    script.write_text(HALF_KEPT)
    launch(2, script, tmp_path / "elsewhere")


def test_classes_are_named_among_the_logits(digits):
    """The ten logits in their own order give the accuracy that they give unnamed; others and too few are refused."""
    images, labels = digits
    named = DIGITS.model_copy(update={"classes": list(range(10)), "metrics": ["accuracy"]})
    found = compute_metrics(images[:60], None, named, labels[:60].tolist())
    assert found["protocol"]["classes"] == list(range(10)) and found["label_accuracy"] > 0.9
    for classes, message in (
        ([0, 1], "2 logits, but images are of class 9"),
        ([*range(9), 10], "10 is no logit"),
    ):
        wrong = named.model_copy(update={"classes": classes})
        with pytest.raises(UserError, match=message):
            compute_metrics(images[:60], None, wrong, labels[:60].tolist())
