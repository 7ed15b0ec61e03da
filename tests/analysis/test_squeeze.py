"""The measurement of a teacher, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from analysis.test_squeezed_model import dit, randomised
from commands import TEACHER_CONFIG, command
from diffusers import ModelMixin

from shd_diffusion.analysis.measure import MeasurementPlan, measure
from shd_diffusion.data import DataConfig, build_source
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process

PLAN = MeasurementPlan(samples=3, timesteps=2, calibration=4)


def process() -> ForwardProcess:
    return ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))


@pytest.fixture(scope="module")
def model() -> ModelMixin:
    return randomised(dit())


@pytest.fixture(scope="module")
def found(model: ModelMixin) -> dict:
    return measure(
        model,
        build_source(DataConfig()),
        process(),
        [4, 2, 1],
        PLAN,
    )


def cases(found: dict, heads: int) -> dict:
    return {case["strategy"]: case for case in found["squeezings"] if case["heads"] == heads}


def test_as_many_heads_as_the_teacher_has_lose_nothing(found: dict) -> None:
    for case in cases(found, 4).values():
        assert case["output_error"]["mean"] < 1e-9
        np.testing.assert_allclose(case["denoising"], found["denoising"], rtol=1e-5)
        for block in case["blocks"].values():
            assert block["residual"] < 1e-5 and block["block_error"] < 1e-5 and block["from_mean"] == 0


def test_finer_coefficients_lose_less_of_what_they_minimise(found: dict) -> None:
    case = cases(found, 2)
    for name in case["mean"]["blocks"]:
        residual = {strategy: each["blocks"][name]["residual"] for strategy, each in case.items()}
        assert residual["by row"] < residual["closed form"] < residual["mean"]
        assert residual["closed form"] < residual["select"]
        np.testing.assert_allclose(residual["joint"], residual["closed form"], rtol=1e-4)  # one merge a head
    assert case["mean"]["output_error_minus_mean"]["mean"] == 0
    assert sum(block["from_mean"] for block in case["matched mean"]["blocks"].values()) == 0
    assert all(block["from_mean"] > 0 for block in case["closed form"]["blocks"].values())


def test_the_share_saved_agrees_with_what_the_merges_lose(found: dict) -> None:
    """One pair a squeezed head at 2 heads: residuals of `mean` and `closed form` and the pairs tell the same."""
    assert [pair["heads"] for pair in next(iter(found["blocks"].values()))["pairs"]] == [[0, 1], [2, 3]]
    for name, block in found["blocks"].items():
        saved = np.mean([pair["saved"] for pair in block["pairs"]])
        ratio = (
            cases(found, 2)["closed form"]["blocks"][name]["residual"]
            / (cases(found, 2)["mean"]["blocks"][name]["residual"])
        )
        np.testing.assert_allclose(ratio, np.sqrt(1 - saved), atol=0.03)
        assert 0 < block["total_variation"]["nearest"] <= block["total_variation"]["mean"] < 1


def test_coefficients_are_told_for_each_merge(found: dict) -> None:
    for name, merges in (("closed form", 3), ("by row", 3)):
        for block in cases(found, 1)[name]["blocks"].values():
            assert len(block["coefficients"]) == merges
            assert all(
                0 <= merge["quantiles"][0] <= merge["quantiles"][4] <= 1 for merge in block["coefficients"]
            )
            assert all((merge["sd_rows"] is None) == (name != "by row") for merge in block["coefficients"])


def test_squeezed_maps_lose_less_than_uniform_ones(found: dict) -> None:
    assert 0 < cases(found, 2)["closed form"]["output_error"]["mean"] < found["uniform_output_error"]


def test_the_same_seed_measures_the_same(model: ModelMixin, found: dict) -> None:
    again = measure(
        model,
        build_source(DataConfig()),
        process(),
        [1],
        PLAN,
    )
    assert again["squeezings"] == [case for case in found["squeezings"] if case["heads"] == 1]


def test_blocks_of_one_head_are_left_as_they_are() -> None:
    data = build_source(DataConfig())
    found = measure(randomised(dit(heads=1)), data, process(), [1], PLAN)
    assert all(block["pairs"] == [] for block in found["blocks"].values())
    assert all(case["output_error"]["mean"] < 1e-9 for case in found["squeezings"])


@pytest.fixture()
def run(model: ModelMixin, tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    model.save_pretrained(folder / "pipeline" / "denoiser")
    (folder / "config.yaml").write_text(TEACHER_CONFIG.read_text())
    return folder


def test_the_command_writes_metrics_and_a_picture(run: Path) -> None:
    code, out, _ = command("squeeze", run, "--heads", "2,3", "--samples", 2, "--timesteps", 2)
    assert code == 0 and "closed" in out
    results = json.loads((run / "squeezing" / "squeezing.json").read_text())
    assert {case["heads"] for case in results["squeezings"]} == {2, 3}
    assert results["protocol"] == {
        "data": "digits", "samples": 2, "timesteps": 2, "calibration": 32, "seed": 0
    }  # fmt: skip
    lines = (run / "squeezing" / "squeezing.csv").read_text().splitlines()
    assert len(lines) == 1 + len(results["squeezings"]) * 2
    assert (run / "squeezing" / "squeezing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("heads", "said"),
    [("5", "from 1 to 4"), ("0", "from 1 on, such as 6,5"), ("two", "from 1 on, such as 6,5")],
)
def test_heads_that_cannot_be(run: Path, heads: str, said: str) -> None:
    code, _, err = command("squeeze", run, "--heads", heads)
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (run / "squeezing").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    code, _, err = command("squeeze", tmp_path, "--heads", "2")
    assert code == 2 and "not a run folder" in err
