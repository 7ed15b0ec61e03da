"""Pipelines, sampled and evaluated in one command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import FEW_IMAGES, command, sets

OPTIONS = ["--reference", "digits", "--extractor", "digits-classifier"]


@pytest.fixture
def pipeline(runs: Path, tmp_path: Path) -> Path:
    """The pipeline folder of a run, somewhere else."""
    return Path(shutil.copytree(runs / "teacher" / "pipeline", tmp_path / "mine"))


def test_a_pipeline_has_the_metrics_of_its_run(pipeline: Path, runs: Path) -> None:
    code, printed, errors = command("evaluate", pipeline, *OPTIONS, *sets(*FEW_IMAGES))
    assert code == 0, errors
    metrics = json.loads(printed)
    of_the_run = json.loads((runs / "teacher" / "evaluation" / "metrics.json").read_text())
    compared = ("fid", "kid_mean", "precision", "recall", "inception_score_mean", "label_accuracy")
    assert {name: metrics[name] for name in compared} == {name: of_the_run[name] for name in compared}
    protocol = metrics["protocol"]
    assert protocol["scheduler"] == "DDIMScheduler" and len(protocol["pipeline_sha256"]) == 64
    assert protocol["num_images"] == 24 and protocol["pass_size"] == 32

    place = pipeline.with_name("mine-evaluation")
    assert json.loads((place / "evaluation" / "metrics.json").read_text()) == metrics
    written = {path.name for path in (place / "evaluation").iterdir()}
    assert written - {".lock"} == {"metrics.json", "nearest.json", "nearest.png"}
    samples = {path: path.stat().st_mtime_ns for path in (place / "samples").glob("*.png")}
    assert command("evaluate", pipeline, *OPTIONS, *sets(*FEW_IMAGES))[1] == printed
    assert samples == {path: path.stat().st_mtime_ns for path in samples} and len(samples) == 24


def test_the_scheduler_is_the_pipelines_own_unless_told(pipeline: Path, tmp_path: Path) -> None:
    index, config = pipeline / "model_index.json", pipeline / "scheduler" / "scheduler_config.json"
    for file in (index, config):
        file.write_text(file.read_text().replace("DDIMScheduler", "EulerDiscreteScheduler"))
    few = sets("sample.num_images=12", "sample.num_inference_steps=2")
    for told, expected in (
        ([], "EulerDiscreteScheduler"),
        (sets("sample.scheduler=DDPMScheduler"), "DDPMScheduler"),
    ):
        printed = command("evaluate", pipeline, *OPTIONS, *few, *told, "--output", tmp_path / expected)[1]
        assert json.loads(printed)["protocol"]["scheduler"] == expected
        assert (tmp_path / expected / "samples" / "000011.png").exists()


def test_samples_of_other_weights_are_not_reused(pipeline: Path, runs: Path) -> None:
    few = sets("sample.num_images=10", "sample.num_inference_steps=1")
    assert command("evaluate", pipeline, *OPTIONS, *few)[0] == 0
    shutil.rmtree(pipeline)
    shutil.copytree(runs / "kd-shd" / "pipeline", pipeline)
    code, _, errors = command("evaluate", pipeline, *OPTIONS, *few)
    assert code == 2 and "pipeline_sha256" in errors and "sampling.json" in errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--reference"),
        (["--reference", "nowhere"], "nowhere"),
        ([*OPTIONS, "--extractor", "nothing"], "nothing"),
        ([*OPTIONS, "--set", "sample.steps=3"], "sample.steps"),
        ([*OPTIONS, "--set", "sample.scheduler=Nope"], "Nope"),
    ],
)
def test_what_cannot_be_evaluated_is_told_before_sampling(
    arguments: list[str], says: str, pipeline: Path
) -> None:
    code, _, errors = command("evaluate", pipeline, *arguments)
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and says in message[0], errors
    assert not pipeline.with_name("mine-evaluation").exists()


def test_a_hub_name_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, errors = command("evaluate", "nobody/nothing", *OPTIONS)
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and "nobody/nothing" in message[0] and "hub" in message[0]
    assert not list(tmp_path.iterdir())


def test_an_output_is_for_one_pipeline(runs: Path, tmp_path: Path) -> None:
    for targets in ([runs / "teacher"], [runs / "teacher" / "pipeline"] * 2):
        code, _, errors = command("evaluate", *targets, *OPTIONS, "--output", tmp_path / "out")
        assert code == 2 and "--output" in errors and not (tmp_path / "out").exists()
