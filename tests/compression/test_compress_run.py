"""`compress` through the command line: from a run to a smaller pipeline, and its healing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import DISTILL_CONFIG, FEW_IMAGES, SHORT, TEACHER_CONFIG, command, sets
from diffusers import DDPMScheduler
from small_models import small_dit

from shd_diffusion import compress_run
from shd_diffusion.compress_run import calibrate
from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.data import build_source
from shd_diffusion.losses.shd import SHD
from shd_diffusion.models.denoiser import freeze
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling import ClassConditionalPipeline
from shd_diffusion.squeezing.plan import BlockPlan, members, plan_merges, plans_from_json
from shd_diffusion.training.build import build


@pytest.fixture(scope="module")
def compressed(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed") / "six"
    code, output, errors = command(
        "compress", runs / "teacher", "--heads", 6, "--neurons", 0.5, "--images", 64, "--output", folder
    )
    assert code == 0, errors
    assert f"compressed: {folder}" in output
    return folder


def test_it_has_fewer_heads_and_neurons_and_says_what_they_lost(compressed: Path) -> None:
    found = json.loads((compressed / "compression.json").read_text())
    assert {(part["what"], part["before"], part["after"]) for part in found["parts"]} == {
        ("heads", 12, 6), ("neurons", 384, 192),
    }  # fmt: skip
    heads = [part for part in found["parts"] if part["what"] == "heads"]
    assert all(0 <= part["lost"] <= part["lost_before"] for part in heads)  # the refit loses nothing
    pipeline = ClassConditionalPipeline.from_pretrained(compressed)
    parameters = sum(parameter.numel() for parameter in pipeline.denoiser.parameters())
    assert parameters == found["parameters"]["after"] < found["parameters"]["before"]
    assert "shd-diffusion" in (compressed / "README.md").read_text()


def test_it_is_evaluated_and_healed_like_any_other(compressed: Path, runs: Path, tmp_path: Path) -> None:
    code, _, errors = command("sample", compressed, *sets(*FEW_IMAGES))
    assert code == 0, errors
    code, output, errors = command("evaluate", compressed, *sets("evaluate.against_teacher=4"))
    assert code == 0 and json.loads(output)["fid"] > 0, errors
    assert json.loads(output)["against_teacher"]["latent_relative_mse"]["mean"] > 0
    config = tmp_path / "heal.yaml"
    text = DISTILL_CONFIG.read_text()
    start, end = text.index("student:"), text.index("losses:")
    config.write_text(f"{text[:start]}student:\n  pretrained: {compressed}\n\n{text[end:]}")
    more = sets(*SHORT, "train.max_steps=2", f"teacher.path={runs / 'teacher'}")
    code, _, errors = command("distill", config, "--output", tmp_path / "healed", *more)
    assert code == 0, errors
    assert json.loads((tmp_path / "healed" / "summary.json").read_text())["heads"] == 6
    kept, plans = ((run / "merge_plans.json") for run in (tmp_path / "healed", compressed))
    assert kept.read_bytes() == plans.read_bytes()
    # its config.yaml reads back: it is sampled, and goes on
    assert command("sample", tmp_path / "healed", *sets(*FEW_IMAGES))[0] == 0
    more += sets("train.max_steps=3")
    assert command("distill", config, "--output", tmp_path / "healed", *more)[0] == 0


def test_what_is_compressed_again_takes_no_samples_along(compressed: Path, tmp_path: Path) -> None:
    """Its pipeline's own parts go along, not what was written beside them."""
    (compressed / "samples").mkdir(exist_ok=True)
    (compressed / "samples" / "000000.png").write_bytes(b"")
    again = tmp_path / "again"
    code, _, errors = command("compress", compressed, "--neurons", 0.5, "--images", 64, "--output", again)
    assert code == 0, errors
    assert not (again / "samples").exists()
    assert plans_from_json((again / "merge_plans.json").read_text()) == {}  # no head left this time
    summary = json.loads((again / "summary.json").read_text())
    assert summary["stage"] == "compress" and summary["teacher"] == str(compressed)
    assert summary["heads"] == summary["teacher_heads"] == 6


def test_nothing_is_trained_into_it(compressed: Path) -> None:
    before = {path: path.read_bytes() for path in compressed.glob("*.*")}
    code, _, errors = command("train-teacher", TEACHER_CONFIG, "--output", compressed)
    assert code == 2 and "is a pipeline that `compress` made; give another --output" in errors
    assert before == {path: path.read_bytes() for path in compressed.glob("*.*")}


def test_its_heads_learn_from_those_that_merged_into_them(
    compressed: Path, runs: Path, tmp_path: Path
) -> None:
    plans = plans_from_json((compressed / "merge_plans.json").read_text())
    assert {len(members(plan.plan, 12)) for plan in plans.values()} == {6}
    assert all(name == plan.teacher for name, plan in plans.items())
    text = DISTILL_CONFIG.read_text()
    start, end = text.index("student:"), text.index("losses:")
    path = tmp_path / "heal.yaml"
    path.write_text(f"{text[:start]}student:\n  pretrained: {compressed}\n\n{text[end:]}")
    of_teacher = f"teacher.path={runs / 'teacher'}"

    def shd(*overrides: str) -> SHD:
        config = read_config(path, DistillConfig, [of_teacher, *overrides])
        term = build(config, "heal.yaml", build_source(config.trained_on)).terms["shd"]
        assert isinstance(term, SHD)
        return term

    own, adjacent = shd(), shd("losses.shd.pairing=adjacent")
    merged = {name: plan.plan for name, plan in plans.items()}
    assert {name: own.loss.plan(name, 12, 6) for name in plans} == merged
    assert {adjacent.loss.plan(name, 12, 6) for name in plans} == {plan_merges(12, 6)} != set(merged.values())
    first = "transformer_blocks.0.attn1"
    with pytest.raises(ValueError, match="squeezed from another teacher"):
        own.take_plans({first: BlockPlan(plan_merges(10, 6))})
    other = {first: BlockPlan(merged[first], "transformer_blocks.1.attn1")}
    with pytest.raises(
        ValueError, match=r"of the teacher's \S+1\.attn1 and learns from \S+0\.attn1; give `layer_map`"
    ):
        own.take_plans(other)
    adjacent.take_plans(other)

    run = tmp_path / "run"  # of a run's pipeline they lie in the run
    run.mkdir()
    (run / "pipeline").symlink_to(compressed)
    again = f"student.pretrained={run / 'pipeline'}"
    assert {name: shd(again).loss.plan(name, 12, 6) for name in plans} == dict.fromkeys(
        plans, plan_merges(12, 6)
    )
    (run / "merge_plans.json").write_text(json.dumps({first: merged[first]}))  # as it was once written
    assert shd(again).loss.plan(first, 12, 6) == merged[first]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--heads", 13], "13"),
        (["--blocks", 7], "7"),
        (["--heads", 5, "--plain"], "5"),
        (["--heads", 3.9], "give a share or a whole number"),
        ([], "nothing is to leave: give --heads"),
    ],
)
def test_what_cannot_be_had_is_one_line(options: list, says: str, runs: Path, tmp_path: Path) -> None:
    code, _, errors = command("compress", runs / "teacher", *options, "--output", tmp_path / "no")
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and says in message[0], errors
    assert not (tmp_path / "no").exists()


# --- a budget -----------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline_of_two_blocks(tmp_path: Path) -> Path:
    """With every parameter random: as initialised, its blocks compute nothing."""
    torch.manual_seed(0)
    model = small_dit(heads=4, layers=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ClassConditionalPipeline(model, DDPMScheduler(), sample_shape=[1, 8, 8]).save_pretrained(
        tmp_path / "teacher"
    )
    return tmp_path / "teacher"


@pytest.mark.parametrize(
    ("file", "key", "value", "says"),
    [
        (
            "scheduler/scheduler_config.json",
            "prediction_type",
            "v_prediction",
            "`diffusion.objective` is 'epsilon'",
        ),
        ("model_index.json", "scheduler", "x", "not the index of a pipeline"),
        ("model_index.json", "denoiser", ["x"], "not the index of a pipeline"),
    ],
)
def test_a_pipeline_that_the_data_are_not_for_is_one_line(
    file: str, key: str, value: object, says: str, pipeline_of_two_blocks: Path, tmp_path: Path
) -> None:
    path = pipeline_of_two_blocks / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    config = tmp_path / "config.yaml"
    config.write_text(f"base: {TEACHER_CONFIG}\ndiffusion: {{objective: epsilon}}\n")
    options = "--data", config, "--heads", 2, "--output", tmp_path / "no"
    code, _, errors = command("compress", pipeline_of_two_blocks, *options)
    assert code == 2 and says in errors.splitlines()[-1] and not (tmp_path / "no").exists(), errors


def test_a_dry_run_shows_the_plan_and_writes_nothing(pipeline_of_two_blocks: Path, tmp_path: Path) -> None:
    options = "--budget", "macs=0.6", "--dry-run", "--images", 64, "--output", tmp_path / "no"
    code, output, errors = command("compress", pipeline_of_two_blocks, "--data", TEACHER_CONFIG, *options)
    assert code == 0, errors
    assert "of 128 neurons" in output and "total" in output and "multiply-adds" in output
    assert not (tmp_path / "no").exists()


def test_a_budget_is_kept_and_its_plan_stands_beside_the_pipeline(
    pipeline_of_two_blocks: Path, tmp_path: Path
) -> None:
    budget = "--budget", "parameters=0.6", "--timesteps", "0,1,1,1,0"
    options = "--data", TEACHER_CONFIG, "--images", 64, "--output", tmp_path / "small"
    code, _, errors = command("compress", pipeline_of_two_blocks, *budget, *options)
    assert code == 0, errors
    found = json.loads((tmp_path / "small" / "compression.json").read_text())
    plan, sizes = found["plan"], found["parameters"]
    assert plan["budget"] == {"unit": "parameters", "share": 0.6}
    assert plan["before"] == sizes["before"]
    assert plan["after"] == plan["measured_after"] == sizes["after"] <= 0.6 * sizes["before"]
    assert plan["lost"] == pytest.approx(sum(part["lost"] for part in plan["parts"]))
    planned = {(part["name"], part["what"], part["keeps"]) for part in plan["parts"]}
    assert planned == {(part["name"], part["what"], part["after"]) for part in found["parts"]}
    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path / "small")
    assert sum(parameter.numel() for parameter in pipeline.denoiser.parameters()) == sizes["after"]
    readme = (tmp_path / "small" / "README.md").read_text()
    assert "Found for `--budget parameters=0.6`" in readme and "The\nimportance of a part is" in readme
    for part in plan["parts"]:
        keeps = "left" if part["what"] == "block" else f"{part['keeps']} of {part['before']} {part['what']}"
        assert f"| `{part['name']}` | {keeps} | {part['lost']:.5f} |" in readme


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--budget", "macs=0.01"], "the least that can be had is macs="),
        (["--budget", "flops=0.5"], "flops"),
        (["--budget", "macs=0.5", "--heads", 6, "--plain"], "leave --heads, --plain out"),
        (["--budget", "macs=0.5", "--heads", 0], "leave --heads out"),
        (["--dry-run"], "--budget macs=0.5"),
        (["--budget", "parameters=1.2"], "above 0 and up to 1"),
        (["--budget", "latency=0"], "above 0 and up to 1"),
        (["--budget", "macs=0.5", "--timesteps", "1,x"], "--timesteps 1,x: give a weight for each"),
        (["--budget", "macs=0.5", "--timesteps", "0,0"], "such as 2,1,0"),
        (["--budget", "macs=0.5", "--timesteps=-1,2"], "such as 2,1,0"),
    ],
)
def test_a_budget_that_cannot_be_had_is_one_line(
    options: list, says: str, runs: Path, tmp_path: Path
) -> None:
    code, _, errors = command("compress", runs / "teacher", *options, "--output", tmp_path / "no")
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and says in message[0], errors
    assert not (tmp_path / "no").exists()


def test_without_a_folder_to_write_there_is_nothing_to_do(runs: Path) -> None:
    code, _, errors = command("compress", runs / "teacher", "--heads", 6)
    assert code == 2 and "error: --output DIR is missing" in errors


def test_a_pipeline_by_ddpm_keeps_its_learned_variance(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = DDPMScheduler(variance_type="learned_range")
    teacher = Teacher(freeze(small_dit(4, out_channels=2)), scheduler=learned)
    monkeypatch.setattr(compress_run, "load_teacher", lambda _: teacher)
    found = calibrate("teacher", RunFolder(runs / "teacher").read_config(), 64)
    assert found.scheduler.config.variance_type == "learned_range"


def test_calibration_takes_timesteps_as_often_as_it_is_told(runs: Path) -> None:
    config = RunFolder(runs / "teacher").read_config()
    found = calibrate(str(runs / "teacher"), config, 512, (0, 3, 1, 0))
    timesteps = torch.cat([steps for _, steps, _ in found.batches])
    assert timesteps.min() >= 250 and timesteps.max() < 750
    assert abs((timesteps < 500).double().mean() - 0.75) < 4 * (0.75 * 0.25 / 512) ** 0.5
    even = calibrate(str(runs / "teacher"), config, 64, (1, 1)).batches[0][1]
    assert torch.equal(even, calibrate(str(runs / "teacher"), config, 64).batches[0][1])
