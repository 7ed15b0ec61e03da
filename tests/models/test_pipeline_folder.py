"""Pipelines on the hub, whose client is replaced by a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from tiny_pipelines import PIPELINES, t5
from transformers import AutoTokenizer

from shd_diffusion.data import latent_space
from shd_diffusion.data.latent_space import load_vae
from shd_diffusion.models import pipeline_folder
from shd_diffusion.models.pipeline_folder import PipelineFolder, find_pipeline

NAME = "owner/pipeline"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the hub has under `NAME`."""
    torch.manual_seed(0)
    folder = tmp_path / "hub"
    PIPELINES["pixart-sigma"]().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda name: index if name == NAME else {})

    def snapshot(name: str, allow_patterns: list[str], **_: Any) -> str:
        assert name == NAME and not any(pattern.startswith("transformer") for pattern in allow_patterns)
        return str(folder)

    monkeypatch.setattr(pipeline_folder, "snapshot_download", snapshot)
    return folder


def found(name: str) -> PipelineFolder:
    pipeline = find_pipeline(name)
    assert pipeline is not None
    return pipeline


def test_a_hub_name_is_the_same_pipeline_as_its_folder(hub: Path) -> None:
    here, there = found(str(hub)), found(NAME)
    assert there.takes_prompts and there.part == here.part == "transformer"
    assert there.hash_prompt_parts() == here.hash_prompt_parts()


def test_what_encodes_prompts_is_told_by_its_files(hub: Path) -> None:
    before = found(str(hub)).hash_prompt_parts()
    (hub / "text_encoder" / "model.fp16.safetensors").write_bytes(b"another format of the same")
    (hub / "transformer" / "config.json").write_text("{}")
    assert found(str(hub)).hash_prompt_parts() == before
    torch.manual_seed(1)
    t5().save_pretrained(hub / "text_encoder")
    other_weights = found(str(hub)).hash_prompt_parts()
    tokenizer = AutoTokenizer.from_pretrained(hub / "tokenizer")
    tokenizer.add_tokens(["cat"])
    tokenizer.save_pretrained(hub / "tokenizer")
    other_tokenizer = found(str(hub)).hash_prompt_parts()
    index = json.loads((hub / "model_index.json").read_text())
    (hub / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    assert len({before, other_weights, other_tokenizer, found(str(hub)).hash_prompt_parts()}) == 4


def test_the_vae_of_a_hub_pipeline_is_in_its_own_folder(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []
    load = AutoModel.from_pretrained

    def loading(name: str, subfolder: str | None = None, **keys: Any) -> Any:
        asked.append((name, subfolder))
        return load(str(hub), subfolder=subfolder, **keys)

    monkeypatch.setattr(latent_space.AutoModel, "from_pretrained", loading)
    assert load_vae(NAME).config.latent_channels == 4
    assert asked == [(NAME, "vae")]
