"""Images that a teacher has sampled, as data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import DISTILL_CONFIG, command, sets
from PIL import Image

from shd_diffusion.data import open_dataset
from shd_diffusion.data.datasets import DataConfig
from shd_diffusion.errors import UserError

LABELS = [0, 1, 2, 0, 1, 2, 0]


def write_samples(folder: Path, grey: bool, **said: object) -> np.ndarray:
    """A folder as `sample` leaves it, of images of noise; these, (N, H, W, 3)."""
    folder.mkdir(parents=True)
    levels = np.random.default_rng(0).integers(0, 256, (len(LABELS), 4, 6, 3), dtype=np.uint8)
    levels = np.repeat(levels[..., :1], 3, axis=-1) if grey else levels
    for index, image in enumerate(levels):
        Image.fromarray(image).save(folder / f"{index:06d}.png")
    told = {"num_images": len(LABELS), "labels": LABELS, "protocol": {"seed": 0}}
    (folder / "sampling.json").write_text(json.dumps(told | said))
    return levels


@pytest.mark.parametrize("grey", [True, False])
def test_images_are_as_they_were_sampled(grey: bool, tmp_path: Path) -> None:
    levels = write_samples(tmp_path / "samples", grey)
    images = open_dataset(DataConfig(name="samples", path=str(tmp_path / "samples")))
    assert images.shape == (1 if grey else 3, 4, 6)
    assert len(images) == 7 and images.num_classes == 3 and images.class_names is None
    for index, label in enumerate(LABELS):
        item = images[index]
        expected = torch.from_numpy(levels[index]).permute(2, 0, 1)[: images.shape[0]]
        assert torch.equal(item["image"], expected) and item["class_labels"] == label


def test_classes_keep_their_names(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", False, class_names={"0": "a", "1": "b", "2": "c"})
    images = open_dataset(DataConfig(name="samples", path=str(tmp_path / "samples")))
    assert images.class_names == ["a", "b", "c"]


def test_other_samples_are_other_data(tmp_path: Path) -> None:
    found = set()
    for number, said in enumerate(({}, {"protocol": {"seed": 1}}, {"num_images": 6, "labels": LABELS[:6]})):
        folder = tmp_path / str(number)
        write_samples(folder, True, **said)
        found.add(open_dataset(DataConfig(name="samples", path=str(folder))).fingerprint())
    assert len(found) == 3


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"num_images": 0, "labels": []}, "no sampling.json of finished samples in it; give the folder"),
        ({"labels": None, "prompts": ["a cat"] * 7}, "made from prompts; use `data.name: prompts`"),
    ],
)
def test_what_is_no_data_is_one_line(said: dict[str, object], says: str, tmp_path: Path) -> None:
    write_samples(tmp_path / "samples", True, **said)
    with pytest.raises(UserError, match=says) as error:
        open_dataset(DataConfig(name="samples", path=str(tmp_path / "samples")))
    assert str(tmp_path / "samples") in str(error.value) and "\n" not in str(error.value)


def test_a_student_learns_from_its_teachers_images(runs: Path, tmp_path: Path) -> None:
    """Through the commands, and it is compared with real images."""
    run = tmp_path / "student"
    data = [
        "data.name=samples",
        f"data.path={runs / 'teacher' / 'samples'}",
        "evaluate.reference={name: digits}",
    ]
    steps = [
        "train.max_steps=2",
        "train.batch_size=8",
        "sample.num_images=24",
        "sample.num_inference_steps=2",
    ]
    teacher = f"teacher.path={runs / 'teacher'}"
    code, _, errors = command("distill", DISTILL_CONFIG, *sets(*data, *steps, teacher), "--output", run)
    assert code == 0, errors
    for stage in ("sample", "evaluate"):
        code, _, errors = command(stage, run)
        assert code == 0, errors
    protocol = json.loads((run / "evaluation" / "metrics.json").read_text())["protocol"]
    assert protocol["reference"] == "digits" and protocol["num_reference_images"] == 1797
