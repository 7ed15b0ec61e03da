"""The caption that is told of a cache's item is the one whose embedding is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import PIPELINES, SIZE

from shd_diffusion.config import parse_config
from shd_diffusion.data import LatentSource
from shd_diffusion.data.datasets import caption_of
from shd_diffusion.data.prepare import PrepareConfig, prepare
from shd_diffusion.errors import UserError
from shd_diffusion.models.prompts import PromptEncoder

CAPTIONS = [["a"], ["b", "bb", "bbb"], ["c"], ["d", "dd"], ["e"], ["f", "ff"], ["g"]]
BROKEN = 2


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    PIPELINES["sd1.5"]().save_pretrained(folder)
    return folder


def write_images(folder: Path) -> None:
    """Every other one is upright; one is broken."""
    folder.mkdir()
    for index in range(len(CAPTIONS)):
        size = (SIZE[1], SIZE[0] // (1 + index % 2))
        Image.fromarray(np.full((*size, 3), 20 * index, np.uint8)).save(folder / f"{index}.png")
    (folder / f"{BROKEN}.png").write_bytes(b"no image")
    lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def prepared(root: Path, teacher: Path, **data: Any) -> LatentSource:
    write_images(root / "images")
    tree = {
        "pipeline": str(teacher),
        "data": {"name": "image_folder", "path": str(root / "images"), "image_size": SIZE[0],
                 "caption_column": "text", **data},
        "prepare": {"shard_size": 2, "max_corrupt_share": 0.5},
    }  # fmt: skip
    prepare(parse_config(tree, PrepareConfig, "test"), root / "cache", "test")
    return LatentSource(root / "cache")


@pytest.mark.parametrize("data", [{}, {"buckets": [[64, 64], [64, 32]]}], ids=["squares", "buckets"])
def test_it_is_the_caption_that_was_encoded(data: dict[str, Any], tmp_path: Path, teacher: Path) -> None:
    """In two epochs, of images in buckets, with one of them left out."""
    source = prepared(tmp_path, teacher, **data)
    assert len(source) == len(CAPTIONS) - 1 and len(source.groups) == (2 if data else 1)
    encoder = PromptEncoder(PIPELINES["sd1.5"](), SIZE)
    told = []
    for epoch in range(2):
        for index in range(len(source)):
            told.append(caption_of(source, index, epoch))
            (expected,) = encoder.encode([told[-1]])
            found = source.item(index, epoch)["encoder_hidden_states"]
            torch.testing.assert_close(found, expected["encoder_hidden_states"], rtol=0, atol=1e-5)
    assert "c" not in told and len({caption[0] for caption in told}) == len(source)
    assert len(set(told)) > len(source)  # of several captions another one


def test_data_that_are_gone_or_others_are_no_source_of_captions(tmp_path: Path, teacher: Path) -> None:
    source = prepared(tmp_path, teacher)
    lines = (tmp_path / "images" / "metadata.jsonl").read_text()
    (tmp_path / "images" / "metadata.jsonl").write_text(lines.replace('"a"', '"h"'))
    with pytest.raises(UserError, match="are others than the cache was made from"):
        caption_of(source, 0, 0)
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="images"):
        caption_of(source, 0, 0)
