"""Classes by name or number in `sample.labels`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import command, sets
from random_runs import finished_run, random_dit_pipeline

from shd_diffusion.config import SampleConfig
from shd_diffusion.errors import UserError
from shd_diffusion.sampling import ClassConditionalPipeline
from shd_diffusion.sampling.by_class import ByClass, find_labels

CLASSES = ["cat", "dog", "ship", "3", "two,zwei", "e", "f", "g", "h", "i"]
NAMES = {str(number): name for number, name in enumerate(CLASSES)}


def named() -> ClassConditionalPipeline:
    pipeline = random_dit_pipeline()
    return ClassConditionalPipeline(pipeline.denoiser, pipeline.scheduler, None, [1, 8, 8], NAMES)


def test_names_and_numbers() -> None:
    assert find_labels(named(), ["ship", 0, 3, "zwei", "two,zwei"]) == [2, 0, 3, 4, 4]
    told = ByClass(named(), SampleConfig(labels=["ship", 0])).told(5)
    assert told["labels"] == [2, 0, 2, 0, 2] and told["class_names"] == NAMES
    assert ByClass(named(), SampleConfig(labels=["ship", 0])).settings()["labels"] == [2, 0]


@pytest.mark.parametrize(
    "labels, message",
    [
        (["shipp"], r"`sample\.labels`: no class `shipp`; did you mean `ship`\?"),
        ([10], r"`sample\.labels`: no class 10; they go from 0 to 9"),
        ([-1], r"`sample\.labels`: no class -1"),
        ([], r"`sample\.labels`: lists no class"),
    ],
)
def test_what_is_no_class(labels: list[int | str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_labels(named(), labels)


def test_classes_without_names_go_by_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="have no names, give numbers"):
        find_labels(random_dit_pipeline(), ["cat"])
    run = finished_run(tmp_path / "run")
    options = sets("sample.num_images=3", "sample.num_inference_steps=1", "sample.labels=[4,7]")
    assert command("sample", run, *options)[0] == 0
    assert json.loads((run / "samples" / "sampling.json").read_text())["labels"] == [4, 7, 4]
