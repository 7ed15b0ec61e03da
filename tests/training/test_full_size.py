"""The full-size text-to-image configs: a dry run of each needs the config alone, and finds what it found before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, command, sets
from diffusers import ModelMixin
from huggingface_hub import constants
from test_text_doc import result

from shd_diffusion.training import dry_run
from shd_diffusion.training.build import Parts
from shd_diffusion.training.count import PassCount
from shd_diffusion.training.memory import memory

PARAMETERS = {  # of the published teachers
    "sd15": 859_520_964,
    "pixart-sigma": 610_856_096,
    "flux-dev": 11_901_408_320,
}


def config_of(name: str) -> Path:
    return ROOT / "configs" / "text-to-image" / f"{name}.yaml"


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(ModelMixin, "from_pretrained", loaded)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(dry_run, "SHARE_OF_MEMORY", 0.0)  # no step is taken, whatever the machine
    monkeypatch.chdir(ROOT)  # as the paths in the configs


@pytest.mark.parametrize("name", PARAMETERS)  # of the other configs see test_shipped_configs.py
def test_a_dry_run_needs_the_config_alone(
    name: str, no_weights: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The count of a pass, which takes a minute, is the stored one; all else is built and told anew."""
    stored = result(name)
    images, per_image = stored["images_per_pass"], stored["operations_per_image"]
    forward = per_image["forward"] * images, per_image["teacher_forward"] * images

    def counted(parts: Parts, share: int, accelerator: Any) -> dict[bool, PassCount]:
        assert share == images
        alone = memory(parts, activations=0, extra_parameters=0)["sum"]
        by_option = {False: "plain", True: "gradient_checkpointing"}
        return {
            again: PassCount(
                per_image["training"] * images, forward, stored["memory_bytes_by_option"][option] - alone, 0
            )
            for again, option in by_option.items()
        }

    monkeypatch.setattr(dry_run, "count_passes", counted)
    code, output, errors = command("distill", config_of(name), "--dry-run")
    assert code == 0, errors
    found = json.loads(output)
    assert found["teacher"]["parameters"] == PARAMETERS[name]
    assert found["measured"] is None and "nothing is measured" in errors
    assert {**found, "environment": None, "config": None} == {**stored, "environment": None, "config": None}


def test_without_configs_of_the_teacher_one_line_says_what_to_do(no_weights: None) -> None:
    code, _, errors = command("distill", config_of("flux-dev"), "--dry-run", *sets("teacher.config=null"))
    assert code == 2
    last = errors.strip().splitlines()[-1]
    assert "flux-dev.yaml: key `teacher.path`: black-forest-labs/FLUX.1-dev" in last
    assert "set `teacher.config` to a folder with them" in last
