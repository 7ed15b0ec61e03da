"""From captioned images of many shapes to an SDXL student: buckets, sizes told truly, and a run that goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file
from tiny_pipelines import PIPELINES

from shd_diffusion.config import DistillConfig, read_config, read_prepare_config
from shd_diffusion.data import LatentSource, build_source
from shd_diffusion.data.prepare import prepare
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.training.batches import BatchLayout, BatchLoader, noise_settings
from shd_diffusion.training.run import train

BUCKETS = [(64, 64), (48, 96), (96, 48)]  # height, width
IMAGES = [
    (64, 64),
    (70, 90),
    (50, 110),
    (120, 55),
    (66, 61),
    (51, 97),
    (48, 101),
    (99, 50),
    (110, 48),
    (72, 64),
]


def true_sizes(height: int, width: int) -> tuple[int, ...]:
    """(original, crop, target) of an image that is not halved first, as SDXL is told them."""
    tall, wide = min(BUCKETS, key=lambda bucket: abs(math.log(height / width * bucket[1] / bucket[0])))
    scale = max(tall / height, wide / width)
    top, left = round(height * scale) - tall, round(width * scale) - wide
    return height, width, top // 2, left // 2, tall, wide


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with two captions each, a teacher, its cache, and the run of a student."""
    root = tmp_path_factory.mktemp("buckets")
    (root / "images").mkdir()
    numbers, lines = np.random.default_rng(0), []
    for index, size in enumerate(IMAGES):
        pixels = numbers.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": [f"cat {index}", f"dog {index}"]}))
    (root / "images" / "metadata.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    PIPELINES["sdxl"]().save_pretrained(root / "teacher", safe_serialization=True)
    tree: dict[str, Any] = {
        "output": str(root / "run"),
        "teacher": {"path": str(root / "teacher")},
        "student": {"arguments": {"attention_head_dim": 2}},  # as diffusers misnames the number of heads
        "data": {
            "name": "image_folder",
            "path": str(root / "images"),
            "image_size": 64,
            "caption_column": "text",
            "buckets": [list(bucket) for bucket in BUCKETS],
        },
        "prepare": {"output": str(root / "cache"), "shard_size": 3, "batch_size": 2},
        "losses": {"shd": {"kinds": ["cross"], "after": 0.5}},
        "train": {
            "max_steps": 4,
            "batch_size": 2,
            "checkpoint_every": 2,
            "log_every": 1,
            "condition_dropout": 0.3,
            "validation": {"every": 2, "loss_images": 5},
        },
    }
    (root / "c.yaml").write_text(yaml.safe_dump(tree))
    prepare(read_prepare_config(root / "c.yaml"), root / "cache", "c.yaml")
    train(config(root), root / "run", "c.yaml")
    return root


def config(root: Path) -> DistillConfig:
    return read_config(root / "c.yaml", DistillConfig)


def cache(root: Path) -> LatentSource:
    source = build_source(config(root).trained_on)
    assert isinstance(source, LatentSource)
    return source


SIZES = "added_cond_kwargs.time_ids"


def test_the_cache_tells_the_true_sizes(root: Path) -> None:
    source, expected = cache(root), sorted(true_sizes(*size) for size in IMAGES)
    assert len({size[:2] for size in expected}) == len(IMAGES) and any(
        size[2] or size[3] for size in expected
    )
    for epoch in range(2):  # of both captions
        items = [source.item(index, epoch) for index in range(len(source))]
        assert sorted(tuple(item[SIZES].tolist()) for item in items) == expected
        for item in items:
            latent = item["moments"].shape[2:]
            assert [8 * side for side in latent] == item[SIZES][4:].tolist()
    assert {len(group) for group in source.groups} == {4, 3} and sum(map(len, source.groups)) == len(IMAGES)
    assert SIZES not in source.null  # sizes stay where the prompt is dropped


def test_batches_tell_the_sizes_of_their_images(root: Path) -> None:
    source, of = cache(root), config(root)
    process = ForwardProcess.from_scheduler(
        DDIMScheduler.from_pretrained(root / "teacher", subfolder="scheduler")
    )
    settings = noise_settings(of.train, source)
    loader = BatchLoader(
        source, process, source.null, 0, BatchLayout(2), settings, torch.device("cpu"), (0, 8)
    )
    seen = set()
    for step in range(8):
        ((batch, _),) = loader.step(step)
        sizes = [tuple(row) for row in batch.condition[SIZES].tolist()]
        assert {size[4:] for size in sizes} == {tuple(8 * side for side in batch.clean.shape[2:])}
        assert set(sizes) <= {true_sizes(*size) for size in IMAGES}
        seen |= {size[4:] for size in sizes}
    assert seen == set(BUCKETS)


def test_a_run_that_was_killed_equals_one_that_was_not(root: Path) -> None:
    run, again = RunFolder(root / "run"), RunFolder(root / "again")
    shutil.copytree(run.path, again.path)
    shutil.rmtree(again.checkpoints / "step-00000004")
    shutil.rmtree(again.pipeline)
    again.summary_file.unlink()
    train(config(root), again.path, "c.yaml")
    ours, theirs = (load_file(r.checkpoints / "step-00000004/model.safetensors") for r in (again, run))
    assert theirs and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    logs = [[json.loads(line) for line in r.metrics_file.read_text().splitlines()] for r in (again, run)]
    for log in logs:
        assert [line["step"] for line in log] == [1, 2, 3, 4]
        for line in log:
            line.pop("seconds_per_step")
            assert all(np.isfinite(term["value"]) for term in line["terms"].values())
            assert len(line["shd_by_block"]) == 2 and all(".attn2" in name for name in line["shd_by_block"])
    assert logs[0] == logs[1] and set(logs[0][1]["validation"]["terms"]) == {"denoise", "output", "shd"}
    assert again.attention_file.exists()
