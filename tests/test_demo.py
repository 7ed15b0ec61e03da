"""The demo's steps, and the configs that come with the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, command, sets
from typer.main import get_command

from shd_diffusion import cli
from shd_diffusion.config import DistillConfig, TrainTeacherConfig, read_config, read_run_config
from shd_diffusion.demo import steps, text_steps
from shd_diffusion.sampling.prompts import read_prompts
from shd_diffusion.shipped import CONFIGS


def test_every_step_is_carried_out_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[str]] = []
    monkeypatch.setattr(cli, "_run", lambda step: (done.append(step), print(f"{step[0]} says"))[0])
    folder = tmp_path / "runs"
    code, said, _ = command("demo", "--output", folder, *sets("train.max_steps=7"))
    assert code == 0
    assert done == [step.command for step in steps(folder, ["train.max_steps=7"])]
    assert said.startswith("[1/9] a teacher with 12 heads\ntrain-teacher says\n[2/9] a student with 5 heads")
    assert "[7/9] metrics\n[8/9] what they cost\n[9/9] report\nreport says\n" in said  # quiet ones
    assert f"open {folder / 'report.html'}; next, " in said.splitlines()[-1]

    done.clear()  # each command goes on by itself, but for one
    (folder / "squeezed").mkdir(parents=True)
    (folder / "squeezed" / "summary.json").touch()
    assert command("demo", "--output", folder)[0] == 0
    assert [step[0] for step in done] == [s.command[0] for s in steps(folder) if s.command[0] != "compress"]


def test_its_commands_and_configs_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no configs/ lies
    (teacher, *students), (squeeze, *others) = (
        [
            step.command
            for step in steps(Path("runs"))
            if (step.command[0] in ("train-teacher", "distill")) is trains
        ]
        for trains in (True, False)
    )
    assert read_config(Path(teacher[1]), TrainTeacherConfig).model.arguments["num_attention_heads"] == 12
    weights = []
    for name, file, *options in students:
        overrides = [value for key, value in zip(options[::2], options[1::2], strict=True) if key == "--set"]
        config = read_config(Path(file), DistillConfig, overrides)
        assert name == "distill" and config.teacher.path == "runs/teacher"
        weights.append([config.losses[term].weight for term in ("denoise", "output", "shd")])
    assert weights == [[1, 0, 0], [1, 1, 0], [1, 1, 20]]
    runs = ["runs/teacher", *(step[-1] for step in students), "runs/squeezed"]
    assert squeeze[:2] == ["compress", "runs/teacher"]
    assert [step[0] for step in others] == ["sample", "evaluate", "benchmark", "report"]
    assert all(step[1:6] == runs for step in others)


def test_a_step_that_fails_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)  # which each command replaces
    code, said, errors = command("demo", "--output", tmp_path / "runs", *sets("train.max_steps=none"))
    assert code == 2 and said == "[1/9] a teacher with 12 heads\n" and not (tmp_path / "runs").exists()
    assert errors.startswith("error: configs/digits/teacher.yaml: ") and errors.count("\n") == 1


def test_configs_are_found_in_the_package_and_copied_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CONFIGS.resolve() == ROOT / "configs"  # one copy in the repository
    monkeypatch.chdir(tmp_path)
    assert command("configs") == (0, "configs: configs\n", "")
    copies, originals = (
        {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for place in (tmp_path / "configs", ROOT / "configs")
    )
    assert copies == originals
    code, _, errors = command("configs")
    assert code == 2 and errors == "error: configs: exists already; give a folder that does not\n"
    mine = tmp_path / "configs" / "digits" / "teacher.yaml"
    mine.write_text(mine.read_text().replace("max_steps: 1500", "max_steps: 3"))
    assert read_config(Path("configs/digits/teacher.yaml"), TrainTeacherConfig).train.max_steps == 3


def test_the_demo_from_text_to_image_is_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[str]] = []
    monkeypatch.setattr(cli, "_run", done.append)
    monkeypatch.chdir(tmp_path)  # where no configs/ lies
    code, said, _ = command("demo", "--text", *sets("train.max_steps=7"))
    assert code == 0 and said.startswith("[1/10] a text encoder")
    assert done == [step.command for step in text_steps(Path("runs/emoji"), ["train.max_steps=7"])]
    group: Any = get_command(cli.app)
    for name, *words in done:
        group.commands[name].make_context(name, list(words))  # takes it; nothing is run
    trained = [
        read_run_config(Path(words[0])) for name, *words in done if name in ("train-teacher", "distill")
    ]
    assert [type(config) for config in trained] == [TrainTeacherConfig, DistillConfig, DistillConfig]
    assert all(len(read_prompts(Path(str(config.sample.prompts)))) == 24 for config in trained)
