"""Run folders read as typed data, and what is said of a damaged one."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from shd_diffusion.errors import UserError
from shd_diffusion.reporting import write_report
from shd_diffusion.reporting.neighbour_page import neighbourhoods
from shd_diffusion.reporting.runs import names_apart, read_log, read_runs

from .made_up_runs import BLOCKS


def test_names_are_as_long_as_tells_runs_apart() -> None:
    paths = ["teacher", "study/300/kd/seed-0", "study/600/kd/seed-0", "study/600/kd+shd/seed-0"]
    assert names_apart([Path(path) for path in paths]) == [
        "teacher",
        "300/kd/seed-0",
        "600/kd/seed-0",
        "kd+shd/seed-0",
    ]


def test_every_part_of_a_run_is_read(runs: dict[str, Path]) -> None:
    (run,) = read_runs([runs["kd-shd"]])
    tensors = load_file(runs["kd-shd"] / "attention.safetensors")
    assert run.log and run.samples and run.metrics and run.attention and run.environment
    assert run.command == "shd-diffusion distill configs/digits/kd-shd.yaml"
    assert run.config["losses"]["shd"]["weight"] == 5.0
    assert (run.metric("fid"), run.metric("kid_mean"), run.metric("sfid")) == (104.3, 104.3 / 40, None)
    assert run.metrics.features == "digits-classifier" and run.metrics.per_class_fid["9"] == 104.3 * 1.9
    assert run.samples.labels[:11] == [*range(10), 0]
    assert (run.attention.label, run.attention.timestep, len(run.attention.blocks)) == (3, 250, BLOCKS)
    block = run.attention.blocks[2]
    for field in ("teacher", "squeezed", "student", "coefficients", "weights", "residual", "divergence"):
        np.testing.assert_array_equal(getattr(block, field), tensors[f"transformer_blocks.2.attn1/{field}"])


def test_a_log_has_one_value_a_step_and_nan_where_a_term_was_not_computed(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "terms": {"denoise": {"value": 2.0, "share": 1.0}}},
        {"step": 3, "terms": {"denoise": {"value": 9.0, "share": 1.0}}},
        {
            "step": 2,
            "terms": {"denoise": {"value": 1.0, "share": 0.25}, "shd": {"value": 3.0, "share": 0.75}},
            "shd_by_block": {"blocks.0.attn": 4.0, "blocks.1.attn": 2.0},
        },
        {
            "step": 3,
            "terms": {"denoise": {"value": 0.5, "share": 1.0}},
            "validation": {"fid": 7.0, "loss": 0.4, "terms": {"denoise": 0.3, "shd": 0.2}},
        },
        {"step": 4, "validation": {"loss": 0.2, "terms": {"denoise": 0.2}, "teacher": {"denoise": 0.1}}},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "ter')  # cut off by an interruption
    log = read_log(path)
    np.testing.assert_array_equal(log.steps, [1, 2, 3, 4])
    np.testing.assert_array_equal(
        log.values["denoise"], [2, 1, 0.5, np.nan]
    )  # step 3 was taken again after a resume
    np.testing.assert_array_equal(log.values["shd"], [np.nan, 3, np.nan, np.nan])
    np.testing.assert_array_equal(log.shares["shd"], [np.nan, 0.75, np.nan, np.nan])
    np.testing.assert_array_equal(log.divergences["blocks.0.attn"], [np.nan, 4, np.nan, np.nan])
    np.testing.assert_array_equal(log.validation, [[3, 7]])
    np.testing.assert_array_equal(log.validation_terms["denoise"], [[3, 0.3], [4, 0.2]])
    np.testing.assert_array_equal(log.validation_terms["shd"], [[3, 0.2]])
    np.testing.assert_array_equal(log.teacher_terms["denoise"], [[4, 0.1]])


def test_runs_come_teachers_first_once_each_under_names_that_differ(
    fresh_run: Callable[[str], Path], runs: dict[str, Path]
) -> None:
    teacher, kd = runs["teacher"], runs["kd"]
    assert [run.name for run in read_runs([kd, teacher, kd])] == ["teacher", "kd"]
    other = fresh_run("kd")
    names = [run.name for run in read_runs([kd, other])]
    assert names[0] != names[1]
    assert all(str(path).endswith(name) for path, name in zip([kd, other], names, strict=True))


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
def test_a_folder_that_is_no_finished_run(fresh_run: Callable[[str], Path], name: str) -> None:
    run = fresh_run("kd")
    (run / name).unlink()
    with pytest.raises(UserError, match=rf"{name}: missing.*not a finished run; give the folder that"):
        read_runs([run])


def test_no_run_at_all() -> None:
    with pytest.raises(UserError, match="give at least one run folder"):
        read_runs([])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", "{", "summary.json: not a JSON file"),
        (
            "summary.json",
            "[]",
            "summary.json: Input should be .* Summary; delete it and run the command that wrote it again",
        ),
        (
            "summary.json",
            '{"name": "a", "stage": "distill", "class": "b", "heads": 5}',
            "summary.json: key `parameters`: Field required",
        ),
        ("config.yaml", "a: [", "config.yaml: not a YAML mapping"),
        ("config.yaml", "- a", "config.yaml: not a YAML mapping"),
        (
            "samples/sampling.json",
            '{"labels": [], "num_images": 0}',
            "sampling.json: key `seconds_per_image`: Field",
        ),
        ("metrics.jsonl", 'half\n{"step": 1}\n', "metrics.jsonl: line 1 is not a logged step"),
        ("metrics.jsonl", '[1]\n{"step": 1}\n', "metrics.jsonl: line 1 is not a logged step"),
        ("evaluation/metrics.json", "NaN", "metrics.json: Input should be .*"),
        ("attention.safetensors", "not tensors", "attention.safetensors: damaged"),
        ("summary.json", "{}", "summary.json: key `name`: Field required"),
        (
            "summary.json",
            '{"name": "a", "stage": "distill", "class": "b", "parameters": [], "heads": 5}',
            "summary.json: key `parameters`",
        ),
        ("environment.json", '{"command": 5}', "environment.json: key `command`"),
        ("samples/sampling.json", '{"num_images": 5, "labels": 5, "seconds_per_image": 1}', "key `labels`"),
        ("evaluation/metrics.json", "[]", "metrics.json: Input should be"),
        ("evaluation/metrics.json", "5", "metrics.json: Input should be"),
        ("evaluation/metrics.json", '{"per_class_fid": [1]}', "metrics.json: key `per_class_fid`"),
        ("evaluation/metrics.json", '{"protocol": 5}', "metrics.json: key `protocol`"),
        ("metrics.jsonl", '{}\n{"step": 1}\n', "metrics.jsonl: line 1 is not a logged step"),
        ("metrics.jsonl", '5\n{"step": 1}\n', "metrics.jsonl: line 1 is not a logged step"),
        ("metrics.jsonl", "[" * 100_000 + '\n{"step": 1}\n', "metrics.jsonl: line 1 is not a logged step"),
        ("metrics.jsonl", '{"step": 1, "terms": [1]}\n{"step": 1}\n', "line 1 is not a logged step"),
        ("metrics.jsonl", '{"step": 1, "validation": {}}\n{"step": 1}\n', "line 1 is not a logged step"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl: cannot be read"),
    ],
)
def test_a_damaged_file_is_named(
    fresh_run: Callable[[str], Path], file: str, content: str | bytes, message: str
) -> None:
    run = fresh_run("kd-shd")
    (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_runs([run])
    assert str(run) in str(caught.value) and "\n" not in str(caught.value)


def test_attention_that_lacks_a_tensor(fresh_run: Callable[[str], Path]) -> None:
    path = fresh_run("kd-shd") / "attention.safetensors"
    tensors = load_file(path)
    del tensors["transformer_blocks.1.attn1/squeezed"]
    description = {"blocks": [{"student": "transformer_blocks.1.attn1"}]}
    save_file(tensors, path, metadata={"description": json.dumps(description)})
    with pytest.raises(UserError, match=r"attention\.safetensors: damaged.*squeezed"):
        read_runs([path.parent])
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"attention\.safetensors: damaged.*description"):
        read_runs([path.parent])


def test_parts_that_are_not_there_yet_are_none(fresh_run: Callable[[str], Path]) -> None:
    folder = fresh_run("kd")
    for part in ("samples", "evaluation"):
        shutil.rmtree(folder / part)
    for part in ("metrics.jsonl", "environment.json", "attention.safetensors"):
        (folder / part).unlink()
    (run,) = read_runs([folder])
    assert [run.log, run.samples, run.metrics, run.attention, run.environment] == [None] * 5
    assert run.command == f"shd-diffusion distill {folder / 'config.yaml'}"


def test_weights_by_row_are_averaged(fresh_run: Callable[[str], Path]) -> None:
    path = fresh_run("kd-shd") / "attention.safetensors"
    tensors = load_file(path)
    name = "transformer_blocks.0.attn1"
    weights = tensors[f"{name}/weights"]
    tensors[f"{name}/weights"] = np.stack([weights, weights[..., ::-1]], axis=-1)  # (S, N, M, Q)
    save_file(tensors, path, metadata={"description": json.dumps({"blocks": [{"student": name}]})})
    (run,) = read_runs([path.parent])
    assert run.attention and run.attention.label is None
    expected = (weights + weights[..., ::-1]) / 2
    np.testing.assert_allclose(run.attention.blocks[0].weights, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "nearest.png").unlink(),
        lambda folder: (folder / "nearest.png").write_bytes(b"no image"),
        lambda folder: (folder / "nearest.json").write_text('{"reference": "digits", "samples": []}'),
        lambda folder: (folder / "nearest.json").write_text(
            '{"reference": "digits", "samples": [{"index": 1}]}'
        ),
        lambda folder: Image.new("RGB", (7, 9)).save(folder / "nearest.png"),
    ],
)
def test_damaged_neighbours_are_named(
    fresh_run: Callable[[str], Path], damage: Callable[[Path], object]
) -> None:
    run = fresh_run("kd")
    damage(run / "evaluation")
    with pytest.raises(UserError, match=r"evaluation/nearest\.(json|png): .* run .* again") as caught:
        neighbourhoods(read_runs([run]))
    assert "\n" not in str(caught.value)


def set_keys(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    content["protocol"] |= changes
    file.write_text(json.dumps(content))


def test_metrics_of_other_images_than_there_are_now_are_missing(
    fresh_run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fresh_run("kd")
    for file in ("samples/sampling.json", "evaluation/metrics.json"):
        set_keys(folder / file, steps_trained=600)
    assert read_runs([folder])[0].outdated is None
    set_keys(folder / "samples" / "sampling.json", num_inference_steps=50)
    (run,) = read_runs([folder])
    assert run.samples and run.metrics is None and run.nearest is None
    page = write_report([folder], folder.parent / "report.html").read_text()
    line = (
        f"{folder}: its metrics are of other images than there are now (`num_inference_steps` was 25, and is 50); "
        f"run `shd-diffusion evaluate {folder}`"
    )
    assert [each for each in capsys.readouterr().err.splitlines() if "other images" in each] == [line]
    assert line in html.unescape(page) and "389.7" not in page


@pytest.mark.parametrize("sampled", [True, False])
def test_images_and_metrics_of_fewer_steps_are_missing(
    fresh_run: Callable[[str], Path], sampled: bool
) -> None:
    folder = fresh_run("kd")
    for file in ("samples/sampling.json", "evaluation/metrics.json"):
        set_keys(folder / file, steps_trained=300)
    if not sampled:
        shutil.rmtree(folder / "samples")
    (run,) = read_runs([folder])
    assert (run.samples, run.metrics, run.nearest) == (None, None, None)
    what, delete = ("images", f"delete {folder}/samples, ") if sampled else ("metrics", "")
    assert run.outdated == (
        f"{folder}: its {what} are of step 300, and the run has come to 600 since; {delete}"
        f"run `shd-diffusion sample {folder}`, and run `shd-diffusion evaluate {folder}`"
    )
