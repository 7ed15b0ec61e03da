"""Models that are told the guidance scale are told one of a range: drawn by sample, evenly, times the data's unit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from scipy import stats
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE
from torch import Tensor

from shd_diffusion.config import DistillConfig, TrainTeacherConfig, read_config, read_prepare_config
from shd_diffusion.data import build_source
from shd_diffusion.data.prepare import prepare
from shd_diffusion.data.source import Source
from shd_diffusion.errors import UserError
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.training.batches import BatchLayout, NoiseSettings, draw_noise, make_batch
from shd_diffusion.training.build import build
from shd_diffusion.training.run import train

RANGE = NoiseSettings((2, 4, 4), condition_dropout=0.5, guidance_range=(1.5, 4.0))


def test_scales_follow_from_seed_step_and_place_and_are_drawn_evenly() -> None:
    drawn = draw_noise(0, 4, range(4000), RANGE).guidance
    assert drawn is not None
    assert stats.kstest(drawn.numpy(), "uniform", args=(1.5, 2.5)).pvalue > 1e-3  # of a fixed seed
    assert drawn.min() >= 1.5 and drawn.max() <= 4
    some, other = draw_noise(0, 4, range(7, 19), RANGE).guidance, draw_noise(0, 5, range(12), RANGE).guidance
    assert some is not None and other is not None
    assert torch.equal(drawn[7:19], some) and not torch.equal(drawn[:12], other)
    one = draw_noise(0, 4, range(5), NoiseSettings((2, 4, 4), guidance_range=(3.5, 3.5))).guidance
    assert one is not None and one.tolist() == [3.5] * 5


def test_a_range_changes_nothing_else_of_the_noise() -> None:
    plain = NoiseSettings((2, 4, 4), condition_dropout=0.5, latent_noise=True, tokens=4)
    with_range = NoiseSettings((2, 4, 4), 0.5, latent_noise=True, tokens=4, guidance_range=(1.0, 5.0))
    ours, theirs = draw_noise(3, 2, range(8), with_range), draw_noise(3, 2, range(8), plain)
    assert theirs.guidance is None
    for name in ("shares", "dropped", "flipped", "noise", "latent_noise", "token_order"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


class Told(Source):
    """Samples whose models count guidance in thousandths, as HunyuanVideo's do."""

    condition_names = ["encoder_hidden_states", "guidance"]  # noqa: RUF012 -- as `Source` has it

    def clean(self, items: Mapping[str, Tensor], flipped: Tensor, noise: Tensor | None = None) -> Tensor:
        return items["image"]

    def fingerprint(self) -> str:
        return ""


def test_the_unit_of_the_data_is_scaled_and_never_dropped() -> None:
    noise = draw_noise(0, 0, range(6), RANGE)
    assert noise.guidance is not None and noise.dropped.any() and not noise.dropped.all()
    items = {
        "image": torch.randn(6, 2, 4, 4),
        "encoder_hidden_states": torch.ones(6, 3, 2),
        "guidance": torch.full((6,), 1000.0),
    }
    process = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig(objective="flow")))
    null = {"encoder_hidden_states": torch.zeros(1, 3, 2)}
    batch = make_batch(Told(), process, items, noise, null, torch.device("cpu"))
    assert torch.equal(batch.condition["guidance"], 1000 * noise.guidance)
    dropped = ~batch.condition["encoder_hidden_states"].flatten(1).any(1)
    assert torch.equal(dropped, noise.dropped)
    assert torch.equal(items["guidance"], torch.full((6,), 1000.0))  # what is read once may be read again


# --- in a run ----------------------------------------------------------------------------------------------------


def tree(root: Path, name: str, **of_training: Any) -> dict[str, Any]:
    heads = {"num_attention_heads": 2}
    return {
        "output": str(root / "run"),
        "teacher": {"path": str(root / name)},
        "student": {"arguments": heads},
        "data": {
            "name": "image_folder",
            "path": str(root / "images"),
            "image_size": SIZE[0],
            "caption_column": "text",
        },
        "prepare": {"output": str(root / f"{name}-cache"), "prompt_arguments": ARGUMENTS[name]},
        "train": {"max_steps": 2, "batch_size": 2, **of_training},
    }


def write(root: Path, content: dict[str, Any]) -> Path:
    (root / "c.yaml").write_text(yaml.safe_dump(content))
    return root / "c.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flux.1-dev, which is told the scale, Flux.1-schnell, which is not, and a cache of each."""
    root = tmp_path_factory.mktemp("guidance")
    (root / "images").mkdir()
    Image.new("RGB", SIZE, (80, 0, 0)).save(root / "images" / "0.png")
    Image.new("RGB", SIZE, (0, 80, 0)).save(root / "images" / "1.png")
    lines = [json.dumps({"file_name": f"{index}.png", "text": f"cat {index}"}) for index in range(2)]
    (root / "images" / "metadata.jsonl").write_text("\n".join(lines))
    for name in ("flux-dev", "flux-schnell"):
        PIPELINES[name]().save_pretrained(root / name)
        path = write(root, tree(root, name))
        prepare(read_prepare_config(path), root / f"{name}-cache", str(path))
    return root


def test_a_teacher_and_its_student_are_told_what_was_drawn(root: Path) -> None:
    config = read_config(write(root, tree(root, "flux-dev", guidance_range=[2, 3])), DistillConfig)
    parts = build(config, "c.yaml", build_source(config.trained_on))
    assert parts.null.keys().isdisjoint({"guidance"})
    loader = parts.loader(torch.device("cpu"))(BatchLayout(2), 0)
    for step in range(2):
        ((batch, _),) = loader.step(step)
        settings = NoiseSettings(parts.data.shape, latent_noise=True, guidance_range=(2.0, 3.0))
        expected = draw_noise(config.seed, step, range(2), settings).guidance
        assert expected is not None and torch.equal(batch.condition["guidance"], expected)


@pytest.mark.parametrize(
    ("name", "stage", "given", "says"),
    [
        ("flux-dev", "distill", {}, "is told the guidance scale, .* such as \\[1, 5\\]"),
        ("flux-dev", "train-teacher", {}, "is told the guidance scale, .* such as \\[1, 5\\]"),
        ("flux-dev", "distill", {"guidance_range": [4, 2]}, "\\[4.0, 2.0\\] ends before it begins"),
        ("flux-schnell", "distill", {"guidance_range": [1, 4]}, "is told no guidance scale; remove it"),
    ],
)
def test_a_range_that_does_not_fit_is_refused_in_one_line(
    root: Path, name: str, stage: str, given: dict[str, Any], says: str
) -> None:
    content, kind = tree(root, name, **given), DistillConfig
    if stage == "train-teacher":
        content["pipeline"] = content.pop("teacher")["path"]
        content["model"], kind = content.pop("student"), TrainTeacherConfig
    config = read_config(write(root, content), kind)
    with pytest.raises(UserError, match=rf"^c\.yaml: key `train\.guidance_range`: [^\n]*{says}[^\n]*$"):
        train(config, root / "run", "c.yaml")
    assert not (root / "run").exists()
