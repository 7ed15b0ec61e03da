"""The full-size text-to-image configs: a dry run of each needs the config alone, and the document tells what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, command, sets
from diffusers import ModelMixin
from huggingface_hub import constants

from shd_diffusion.training import dry_run
from shd_diffusion.training.count import PassCount

PARAMETERS = {  # of the published teachers
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "pixart-sigma": 610_856_096,
    "sd35-medium": 2_243_171_520,
    "flux-dev": 11_901_408_320,
}


def config_of(name: str) -> Path:
    return ROOT / "configs" / "text-to-image" / f"{name}.yaml"


def result(name: str) -> dict[str, Any]:
    """What the dry run told when docs/text-to-image.md was written."""
    text = (ROOT / "docs" / "results" / f"dry-run-{name}.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(ModelMixin, "from_pretrained", loaded)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(ROOT)  # as the paths in the configs


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_dry_run_needs_the_config_alone(
    name: str, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count of a pass, which takes a minute, is the stored one; all else is built and told anew."""
    stored = result(name)
    images, per_image = stored["images_per_pass"], stored["operations_per_image"]
    forward = per_image["forward"] * images, per_image["teacher_forward"] * images
    by_option = stored["memory_bytes_by_option"]
    beside = stored["memory_bytes"]["sum"] - stored["memory_bytes"]["activations"]

    def counted(parts: Any, share: int, accelerator: Any) -> dict[bool, PassCount]:
        assert share == images
        alone = dry_run.memory(parts, 0, 0)["sum"]
        activations = {
            again: by_option["gradient_checkpointing" if again else "plain"] - alone for again in (False, True)
        }
        return {
            again: PassCount(per_image["training"] * images, forward, activations[again], 0)
            for again in (False, True)
        }

    monkeypatch.setattr(dry_run, "count_passes", counted)
    code, output, errors = command("distill", config_of(name), "--dry-run")
    assert code == 0, errors
    found = json.loads(output)
    assert found["teacher"]["parameters"] == PARAMETERS[name]
    assert found["measured"] is None and "nothing is measured" in errors
    assert found["memory_bytes"]["sum"] - found["memory_bytes"]["activations"] == beside
    assert {**found, "environment": None, "config": None} == {**stored, "environment": None, "config": None}


def test_without_configs_of_the_teacher_one_line_says_what_to_do(no_weights: None) -> None:
    code, _, errors = command("distill", config_of("flux-dev"), "--dry-run", *sets("teacher.config=null"))
    assert code == 2
    last = errors.strip().splitlines()[-1]
    assert "flux-dev.yaml: key `teacher.path`: black-forest-labs/FLUX.1-dev" in last
    assert "set `teacher.config` to a folder with them" in last
