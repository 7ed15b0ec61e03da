"""Samples that are looked at while a model trains: in the run folder and in the trackers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import WandBTracker
from commands import TEACHER_CONFIG, command, sets
from PIL import Image

from shd_diffusion.config import SampleConfig
from shd_diffusion.data.images import to_rgb_bytes
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling import ClassConditionalPipeline
from shd_diffusion.sampling.by_class import sample_images
from shd_diffusion.training.metrics_logger import MetricsLogger
from shd_diffusion.training.validation import sample_grid

SHORT = ["train.max_steps=4", "train.batch_size=4", "train.ema_decay=0.5", "train.trackers=[tensorboard]"]
SMALL = ["model.arguments.num_layers=1", "model.arguments.num_attention_heads=2"]
VALIDATION = [
    f"train.validation.{key}={value}"
    for key, value in (("every", 2), ("num_images", 24), ("num_inference_steps", 2))
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("validated") / "run"
    code, _, errors = command(
        "train-teacher", TEACHER_CONFIG, "--output", run, *sets(*SHORT, *SMALL, *VALIDATION)
    )
    assert code == 0, errors
    return run


def test_the_picture_shows_the_samples_of_the_averaged_model(run: Path) -> None:
    assert [path.name for path in sorted((run / "validation").iterdir())] == [
        "step-00000002.png",
        "step-00000004.png",
    ]
    picture = np.asarray(Image.open(run / "validation" / "step-00000004.png"))
    assert picture.shape == (3 * 50 + 2, 10 * 50 + 2, 3)
    pipeline = ClassConditionalPipeline.from_pretrained(run / "pipeline")
    config = SampleConfig(num_inference_steps=2)
    images = to_rgb_bytes(sample_images(pipeline, range(32), config)).permute(0, 2, 3, 1).numpy()
    for index in (0, 9, 10, 23):
        top, left = 2 + 50 * (index // 10), 2 + 50 * (index % 10)
        np.testing.assert_array_equal(picture[top : top + 48 : 6, left : left + 48 : 6], images[index])
    assert (picture[-50:, -50:] == 255).all()  # 24 images leave the last place of the third row empty


def test_tensorboard_gets_the_picture(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "trackers" / "shd-diffusion"))
    events.Reload()
    assert [(event.step, event.height, event.width) for event in events.Images("samples")] == [
        (2, 152, 502),
        (4, 152, 502),
    ]
    watched = [
        json.loads(line).get("validation") for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [event.value for event in events.Scalars("validation.fid")] == pytest.approx(
        [entry["fid"] for entry in watched if entry]
    )


def test_wandb_gets_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through accelerate's own tracker, to a stand-in for the package itself."""
    logged: list[tuple[dict[str, Any], int]] = []
    session = SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda project: session, Image=lambda pixels: pixels)
    )
    tracker = WandBTracker("trackers")
    tracker.start()
    picture = sample_grid(torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8))
    accelerator = SimpleNamespace(is_main_process=True, trackers=[tracker])
    MetricsLogger(RunFolder(tmp_path), accelerator, 1, 0).log_image(7, picture)
    ((values, step),) = logged
    (pixels,) = values["samples"]
    assert pixels.shape == (68, 200, 3) and step == 7
    np.testing.assert_array_equal(
        np.asarray(Image.open(tmp_path / "validation" / "step-00000007.png")), pixels
    )


def test_it_computes_in_float32_whatever_the_training_computes_in(tmp_path: Path) -> None:
    """Under bf16 the picture is what `sample` draws afterwards, to the level that another memory layout rounds by."""
    run, more = tmp_path / "run", sets("train.mixed_precision=bf16", "train.max_steps=2")
    assert (
        command("train-teacher", TEACHER_CONFIG, "--output", run, *sets(*SHORT, *SMALL, *VALIDATION), *more)[
            0
        ]
        == 0
    )
    picture = np.asarray(Image.open(run / "validation" / "step-00000002.png")).astype(int)
    pipeline = ClassConditionalPipeline.from_pretrained(run / "pipeline")
    images = to_rgb_bytes(sample_images(pipeline, range(32), SampleConfig(num_inference_steps=2)))
    for index in (0, 9):
        shown = picture[2:50:6, 2 + 50 * index : 50 + 50 * index : 6]
        assert np.abs(shown - images[index].permute(1, 2, 0).numpy()).max() <= 1
