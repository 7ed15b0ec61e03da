"""Configs: what is read, and what is refused in one line that names file, key and fix."""

import json
from pathlib import Path

import pytest

from shd_diffusion import config as config_module
from shd_diffusion.config import (
    DistillConfig,
    TrainTeacherConfig,
    dump_config,
    override_config,
    parse_config,
    parse_yaml,
    read_config,
)
from shd_diffusion.data.prepare import PrepareConfig
from shd_diffusion.errors import UserError
from shd_diffusion.shipped import copy_configs, find_config
from shd_diffusion.study.config import StudyConfig
from shd_diffusion.training.text_pipeline import TextPipelineConfig

CONFIGS = Path(__file__).parents[1] / "configs"
DISTILL = CONFIGS / "digits" / "distill.yaml"


def test_dumped_config_reads_back_the_same(tmp_path: Path) -> None:
    config = read_config(DISTILL, DistillConfig, ["train.learning_rate=3e-4", "losses.shd.weight=2"])
    assert config.train.learning_rate == 3e-4
    assert config.losses["shd"].weight == 2.0
    (tmp_path / "copy.yaml").write_text(dump_config(config))
    assert read_config(tmp_path / "copy.yaml", DistillConfig) == config


@pytest.mark.parametrize("text", ["1e-4", "2e5", "on", "2026-01-02", "~", "0o7", "null", "a # b", "é: x"])
def test_a_text_that_looks_like_something_else_reads_back(text: str, tmp_path: Path) -> None:
    config = read_config(DISTILL, DistillConfig, [f"output={json.dumps(text)}"])
    (tmp_path / "copy.yaml").write_text(dump_config(config))
    assert read_config(tmp_path / "copy.yaml", DistillConfig).output == text


def test_a_path_may_begin_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = read_config(
        DISTILL, DistillConfig, ["output=~/runs/a", "sample.prompts=~/b", "teacher.path=a~/c"]
    )
    assert (config.output, config.sample.prompts, config.teacher.path) == (
        "/home/me/runs/a",
        "/home/me/b",
        "a~/c",
    )


def test_copied_configs_name_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copy_configs(Path("mine"))
    named = read_config(Path("mine/emoji/distill.yaml"), DistillConfig).sample.prompts
    assert named == "mine/emoji/prompts.txt" and Path(named).is_file()
    found = read_config(Path("mine/text-to-image/flux-dev.yaml"), DistillConfig).teacher.config
    assert found is not None and find_config(Path(found)).is_dir()
    assert find_config(Path("configs/text-to-image/teachers/flux-dev")).is_dir()  # the package's own


def test_override_leaves_the_rest_alone() -> None:
    config = read_config(CONFIGS / "digits" / "teacher.yaml", TrainTeacherConfig)
    changed = override_config(config, ["sample.num_images=7"], "here")
    assert changed.sample.num_images == 7
    assert changed.train == config.train


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-3", 2e-3), ("1E4", 1e4), ("3", 3), ("1.5", 1.5), ("e3", "e3"), ("no", "no"), ("true", True)],
)
def test_values_are_read_as_people_write_them(text: str, value: object) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.max_step=4", ["unknown key `train.max_step`", "did you mean `max_steps`"]),
        ("stuff=1", ["unknown key `stuff`", "known here", "losses"]),
        ("train.max_steps=many", ["`train.max_steps`", "'many'", "integer"]),
        ("train.batch_size=0", ["`train.batch_size`", "greater than or equal to 1"]),
        ("losses.shd.weight=-1", ["`losses.shd.weight`", "greater than or equal to 0"]),
        ("losses.shd.layer_map=3", ["`losses.shd.layer_map`", "uniform"]),
        ("train.max_steps.deeper=1", ["--set", "`max_steps` is a value"]),
        ("train.max_steps", ["--set train.max_steps", "dotted.key=value"]),
    ],
)
def test_bad_override_is_one_line_with_the_fix(override: str, says: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_config(DISTILL, DistillConfig, [override])
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in says), message


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "just text"])
def test_a_file_that_is_no_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=r"bad\.yaml") as caught:
        read_config(tmp_path / "bad.yaml", DistillConfig)
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_key_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        read_config(tmp_path / "nowhere.yaml", DistillConfig)
    (tmp_path / "part.yaml").write_text("seed: 1\ntrain: {batch_size: 2}\n")
    with pytest.raises(UserError, match=r"`train\.max_steps` is missing"):
        read_config(tmp_path / "part.yaml", TrainTeacherConfig)


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.relative_to(CONFIGS).as_posix()
)
def test_every_config_that_ships_is_valid(path: Path) -> None:
    kinds = {
        "variants": StudyConfig,
        "text_encoder": TextPipelineConfig,
        "student": DistillConfig,
        "model": TrainTeacherConfig,
        "prepare": PrepareConfig,
    }
    tree = config_module._read_tree(path)
    kind = next(kind for key, kind in kinds.items() if key in tree)
    assert read_config(path, kind) == parse_config(tree, kind, "the same")


def test_a_config_starts_from_another(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(
        "seed: 1\ntrain: {max_steps: 3, batch_size: 2}\nmodel: {arguments: {a: 1}}\n"
    )
    (tmp_path / "above.yaml").write_text(
        "base: below.yaml\ntrain: {max_steps: 5}\nmodel: {arguments: {b: 2}}\n"
    )
    config = read_config(tmp_path / "above.yaml", TrainTeacherConfig, ["train.batch_size=4"])
    assert (config.seed, config.train.max_steps, config.train.batch_size) == (1, 5, 4)
    assert config.model.arguments == {"a": 1, "b": 2}
    for again in ("above.yaml", f"../{tmp_path.name}/above.yaml"):  # by another name each time around
        (tmp_path / "below.yaml").write_text(f"base: {again}\n")
        with pytest.raises(UserError, match=r"above\.yaml: key `base`"):
            read_config(tmp_path / "above.yaml", TrainTeacherConfig)


def test_a_key_that_is_given_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("train: {max_steps: 3}\nseed: 1\ntrain: {batch_size: 2}\n")
    with pytest.raises(UserError, match=r"twice\.yaml.*`train` is given twice"):
        read_config(tmp_path / "twice.yaml", TrainTeacherConfig)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 3)}]\n" for i in range(1, 20))


@pytest.mark.parametrize("text", ["[" * 2000, "seed: 2001-99-99", "a: " + "9" * 5000, BOMB, "a: &a [*a]"])
def test_what_breaks_the_parser_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml"):
        read_config(tmp_path / "bad.yaml", TrainTeacherConfig)


def test_a_misspelt_key_is_named_rather_than_the_one_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {max_steps: 3, batchsize: 8}\nmodel: {}\n")
    with pytest.raises(UserError, match=r"unknown key `train\.batchsize`; did you mean `batch_size`"):
        read_config(tmp_path / "mine.yaml", TrainTeacherConfig)


@pytest.mark.parametrize(
    "override",
    [
        "model.arguments.dropout=.nan",
        "sample.scheduler_arguments={a: [1, {b: .inf}]}",
        "sample.pipeline_arguments={a: -.inf}",
    ],
)
def test_arguments_of_other_libraries_are_finite(override: str) -> None:
    tree = {"train": {"max_steps": 1, "batch_size": 1}, "model": {}}
    config = parse_config(tree, TrainTeacherConfig, "mine.yaml")
    with pytest.raises(UserError, match=r"arguments`: .* is no finite number"):
        override_config(config, [override], "mine.yaml")


def test_a_date_is_a_text() -> None:
    assert parse_yaml("2001-01-01") == "2001-01-01"


def test_a_long_value_is_shortened_in_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"seed": "x" * 100_000}, TrainTeacherConfig, "mine.yaml")
    assert len(str(caught.value)) < 300
