"""Every config of a training in configs/: it can be read, its models exist, and a student fits its teacher."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commands import ROOT

from shd_diffusion.config import DistillConfig, RunConfig, TrainTeacherConfig, read_config, read_run_config
from shd_diffusion.evaluation.extractors import image_size_of
from shd_diffusion.models.denoiser import num_classes, num_tokens, sample_shape
from shd_diffusion.models.factory import ModelConfig, build_model, fill_in
from shd_diffusion.training.inspect_models import inspect_model, merges_of, pair_rows

CONFIGS = sorted(
    path
    for path in (ROOT / "configs").glob("*/*.yaml")
    if path.parent.name != "studies" and path.stem not in ("prepare", "pipeline")
)

# Teachers that are converted from published weights, and the configs of the same models.
CONVERTED = {"models/mdtv2-xl-2": "mdtv2-xl-teacher.yaml", "models/dit-xl-2": "dit-xl-teacher.yaml"}


HUB = ROOT / "configs" / "text-to-image" / "teachers"
"""The published configs of pipelines on the hub, by the names of the files that distil them."""


def teacher_model(path: Path, config: DistillConfig) -> ModelConfig:
    """The teacher of a distillation, without weights."""
    if (HUB / path.stem).is_dir():
        return fill_in(ModelConfig(), str(HUB / path.stem))
    found = teacher_config(path, config)
    assert isinstance(found, TrainTeacherConfig)
    return found.model


def teacher_config(path: Path, config: DistillConfig) -> RunConfig:
    """The config that makes the teacher of a distillation: the one whose output is its path."""
    others = [read_run_config(other) for other in CONFIGS if other.parent == path.parent]
    converted = CONVERTED.get(config.teacher.path)
    if converted is not None:
        return read_run_config(path.parent / converted)
    (found,) = [other for other in others if other.output == config.teacher.path]
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_its_models_can_be_built_and_paired(path: Path) -> None:
    config = read_run_config(path)
    assert config.output is not None and config.output.startswith(f"runs/{path.parent.name}/")
    if isinstance(config, DistillConfig) and config.student.pretrained is not None:
        assert config.student.pretrained.startswith(f"runs/{path.parent.name}/")  # made by another command
        return
    section = config.student if isinstance(config, DistillConfig) else config.model
    if section.class_name is None:  # like the teacher but for these
        assert isinstance(config, DistillConfig)
        like = teacher_model(path, config)
        arguments = {**like.arguments, **section.arguments}
        section = like.model_copy(update={"class_name": like.class_name, "arguments": arguments})
    with torch.device("meta"):
        model = build_model(section)
    if config.train.mask_ratio:
        assert num_tokens(model) > 1
    if not isinstance(config, DistillConfig):
        return
    with torch.device("meta"):
        teacher = build_model(teacher_model(path, config))
    assert (sample_shape(teacher), num_classes(teacher)) == (sample_shape(model), num_classes(model))
    rows = [{row.block.name: row for row in inspect_model(part)} for part in (teacher, model)]
    pairs = pair_rows(*(list(part.values()) for part in rows), config.losses["shd"].layer_map)
    assert pairs and all(merges_of(rows[0][by], rows[1][name]) for name, by in pairs.items())


def test_the_examples_of_the_docs_are_whole_configs(tmp_path: Path) -> None:
    by_prompt, again, by_class = (
        read_config(_example(ROOT / page, tmp_path / f"{Path(page).stem}.yaml"), DistillConfig)
        for page in ("README.md", "docs/text-to-image.md", "docs/usage.md")
    )
    assert by_prompt.data.caption_column and by_prompt.prepare and again == by_prompt
    config = by_class
    with torch.device("meta"):
        assert sample_shape(build_model(config.student)) == (3, *[config.data.image_size] * 2)
    assert config.output and image_size_of(config.evaluate.extractor) in (None, config.data.image_size)


def _example(page: Path, to: Path) -> Path:
    """The first config on a page, as a file."""
    (text, *_) = re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    to.write_text(text)
    return to
