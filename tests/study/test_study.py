"""A whole small study through the command line: interrupted, resumed, never repeated."""

from __future__ import annotations

import inspect
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from commands import DISTILL_CONFIG, command, sets
from forks import Fork
from random_runs import write_summary
from safetensors.torch import load_file
from studies import STEPS, in_turn, stand_in, study_file

from shd_diffusion.config import SampleConfig, read_config
from shd_diffusion.errors import OUT_OF_MEMORY, DivergedError, UserError
from shd_diffusion.files import locked, write_json
from shd_diffusion.study import runner
from shd_diffusion.study.config import Budget, Planned, StudyConfig, plan_runs, teacher_of
from shd_diffusion.study.results import collect, read_known


def start_fork(job: runner.Job, command_line: str, threads: int) -> Fork:
    """A worker that need not import anything."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    worker = "shd_diffusion.study.worker:main"
    return Fork(worker, command_line, json.dumps(job.commands), output=str(job.log))


IN_FORKS = f"""
import json
from forks import Fork
from shd_diffusion import cli
from shd_diffusion.study import runner
{inspect.getsource(start_fork)}
runner.Job.start = start_fork
cli.main()
"""


def test_a_study_is_interrupted_and_resumed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, output = study_file(tmp_path, runs / "teacher"), tmp_path / "study"
    script = tmp_path / "study.py"
    script.write_text(IN_FORKS)
    process = Fork(script, "study", study)
    deadline = time.monotonic() + 240
    while not (output / "runs/vkd/seed-0/config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    finished = output / "runs/kd/seed-0"
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert finished / "evaluation/metrics.json" in before
    assert not (output / "runs/kd/seed-1").exists() and not (output / "study.json").exists()

    code, said, errors = command("study", study, *sets("budget.runs=1"))  # by a worker as it is
    assert code == 0 and "2 of 4 runs are complete" in said, errors
    assert (output / "runs/vkd/seed-0/evaluation/metrics.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(runner.Job, "start", start_fork)
        code, said, errors = command("study", study)
    assert code == 0 and "4 of 4 runs are complete" in said, errors
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before

    monkeypatch.setattr(runner, "WORKER", (sys.executable, "-c", "raise SystemExit(2)"))
    assert command("study", study)[0] == 0  # nothing is begun again

    results = json.loads((output / "study.json").read_text())
    rows = {row["variant"]: row for row in results["rows"]}
    assert [row["seeds"] for row in rows.values()] == [[0, 1], [0, 1]]
    assert (rows["kd"]["extra_parameters"], rows["vkd"]["extra_parameters"]) == (0, 6 * 40 * 96)
    metrics = json.loads((finished / "evaluation/metrics.json").read_text())
    assert results["outcomes"][0]["metrics"]["fid"] == metrics["fid"]
    everything, nothing = rows["vkd"]["reached"].values()
    assert (everything["n"], everything["steps"]["mean"], nothing["n"]) == (2, 5.0, 0)
    last = [o["validation"][-1]["fid"] for o in results["outcomes"] if o["variant"] == "kd"]
    assert rows["kd"]["metrics"]["validation_fid_after_1e+06_s"]["mean"] == pytest.approx(sum(last) / 2)
    difference = results["comparisons"][0]["paired"]["difference"]
    first, second = ([o["metrics"]["fid"] for o in results["outcomes"] if o["variant"] == v] for v in rows)
    assert difference["mean"] == pytest.approx(sum(second) / 2 - sum(first) / 2)

    # the run that was interrupted ends as one that was not
    alone = tmp_path / "alone"
    overrides = [f"{k}={v}" for k, v in STEPS.items()] + [f"teacher.path={runs / 'teacher'}", "seed=0"]
    overrides += ["sample.seed=0", "losses.shd.weight=0", "losses.vkd.weight=1"]
    assert command("distill", DISTILL_CONFIG, "--output", alone, *sets(*overrides))[0] == 0
    weights = "pipeline/denoiser/diffusion_pytorch_model.safetensors"
    once, resumed = load_file(alone / weights), load_file(output / "runs/vkd/seed-0" / weights)
    assert all((once[name] == resumed[name]).all() for name in once)


def test_models_are_made_of_the_teacher_before_the_runs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.Job, "start", start_fork)
    heal = tmp_path / "heal.yaml"
    text = DISTILL_CONFIG.read_text()
    start, end = text.index("student:"), text.index("losses:")
    heal.write_text(f"{text[:start]}student:\n  pretrained: none\n\n{text[end:]}")
    study = study_file(
        tmp_path, runs / "teacher", distill=str(heal), seeds=[0], targets=[], after_seconds=[],
        overrides={**STEPS, "train.max_steps": 2, "teacher.path": str(runs / "teacher")},
        compressed={
            "merged": {"heads": 4, "images": 64, "plain": True},
            "dropped": {"heads": 4, "images": 64, "method": "drop", "plain": False},
        },
        variants={"merged": {"student.pretrained": "merged"}, "dropped": {"student.pretrained": "dropped"}},
        reference="merged",
    )  # fmt: skip
    code, said, errors = command("study", study)
    assert code == 0 and "2 of 2 runs are complete" in said, errors
    for name, method in (("merged", "merge"), ("dropped", "drop")):
        made = json.loads((tmp_path / "study/compressed" / name / "compression.json").read_text())
        assert made["method"] == method
        run = yaml.safe_load((tmp_path / f"study/runs/{name}/seed-0/config.yaml").read_text())
        assert run["student"]["pretrained"] == str(tmp_path / "study/compressed" / name)
    text = study.read_text()
    study.write_text(text.replace("method: drop", "method: magnitude"))
    code, said, errors = command("study", study)
    assert code == 2 and "compressed.dropped" in errors and "'method': 'magnitude'" in errors
    note = tmp_path / "study/compressed/merged.json"
    note.write_text(note.read_text().replace('"teacher_sha256": "', '"teacher_sha256": "another'))
    study.write_text(text)
    code, said, errors = command("study", study)
    assert code == 2 and "compressed.merged" in errors and "'teacher_sha256': 'another" in errors


def test_the_end_of_a_session_ends_the_runs() -> None:
    sent: list[int] = []

    def poll() -> None:
        signal.raise_signal(signal.SIGHUP)

    running = SimpleNamespace(poll=poll, send_signal=sent.append, wait=lambda timeout: 0)
    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        runner._run_all([runner.Job("a", [["train"]], Path("log"))], Budget(), 1, lambda job, slot: running)
    assert sent == [signal.SIGINT] and signal.getsignal(signal.SIGHUP) == before


def test_the_teacher_is_that_of_all_variants(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    variants = {"small": {"teacher.path": str(tmp_path / "small")}, "big": {}}
    file = study_file(tmp_path, teacher, variants=variants, reference="big")
    assert teacher_of(plan(file)[1]) == str(teacher)


def test_the_budget_ends_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WORKER", stand_in(0))
    study = study_file(tmp_path, tmp_path / "teacher", budget={"runs": 3}, processes=2)
    code, said, errors = command("study", study)
    assert code == 0 and "0 of 4 runs are complete" in said
    assert errors.count("begun") == errors.count("done") == 3 and "runs left: 1" in errors


def test_a_budget_of_no_runs_writes_up_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WORKER", stand_in(0))
    study = study_file(tmp_path, tmp_path / "teacher", budget={"runs": 0})
    code, said, errors = command("study", study)
    assert code == 0 and "0 of 4 runs are complete" in said and "begun" not in errors


def test_what_a_person_must_mend_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WORKER", stand_in(2, "error: mend this"))
    study = study_file(tmp_path, tmp_path / "teacher")
    code, _, errors = command("study", study)
    assert code == 2 and errors.endswith("error: mend this\n") and errors.count("begun") == 1


def test_what_a_person_must_mend_lets_what_runs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = tmp_path / "taken"
    monkeypatch.setattr(runner, "WORKER", in_turn(2, 0, folder=taken, says="error: mend this"))
    code, _, errors = command("study", study_file(tmp_path, tmp_path / "teacher", processes=2))
    assert code == 2 and errors.endswith("error: mend this\n") and errors.count("begun") == 2
    assert [(taken / name).read_text() for name in "01"] == ["ended"] * 2
    assert (tmp_path / "study" / "study.json").exists()


def test_two_commands_do_not_carry_out_one_study(tmp_path: Path) -> None:
    study = study_file(tmp_path, tmp_path / "teacher")
    with locked(tmp_path / "study" / "logs"):
        code, _, errors = command("study", study)
        assert code == 2 and "another command is at work" in errors
        assert command("study", study, *sets("budget.runs=0"))[0] == 0  # to look at what there is


@pytest.mark.parametrize("code", [1, DivergedError.exit_code, OUT_OF_MEMORY])
def test_runs_that_fail_are_named_after_the_others_ran(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WORKER", stand_in(code, "error: diverged"))
    code, _, errors = command("study", study_file(tmp_path, tmp_path / "teacher"))
    assert code == 2 and errors.count("failed,") == 4 and "kd seed 0, vkd seed 0, kd seed 1" in errors
    assert (tmp_path / "study" / "study.json").exists()


def test_a_study_of_conditions_without_a_run_is_written_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WORKER", stand_in(1))
    code, _, errors = command(
        "study", study_file(tmp_path, tmp_path / "teacher", conditions={"a": {}, "b": {}})
    )
    assert code == 2 and "a kd seed 0, a vkd seed 0, b kd seed 0" in errors
    assert "0 of 8 runs are complete" in (tmp_path / "study" / "study.md").read_text()


def test_a_folder_of_another_config_is_left_alone(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "kd-shd", tmp_path / "study/runs/kd/seed-0")
    (tmp_path / "study/logs").mkdir()  # of a study that has begun
    code, _, errors = command("study", study_file(tmp_path, runs / "teacher"))
    assert code == 2 and "belongs to another config" in errors


@pytest.mark.parametrize(("key", "says"), [("losses.nothing.weight", "nothing"), ("seed.x", "seed")])
def test_a_wrong_override_stops_before_anything_runs(key: str, says: str, tmp_path: Path) -> None:
    study = study_file(tmp_path, tmp_path / "teacher", variants={"kd": {}, "odd": {key: 1}})
    code, _, errors = command("study", study)
    assert code == 2 and says in errors and not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "change", [("train.max_steps", 20), ("train.micro_batch_size", 4), ("train.validation.num_images", 30)]
)
def test_runs_that_were_measured_otherwise_are_no_results(change: tuple[str, int], tmp_path: Path) -> None:
    """They could go on as the same runs, but what they have is no answer to the study as it is now."""
    before, _ = plan(study_file(tmp_path, tmp_path / "teacher"))
    before[0].run.path.mkdir(parents=True)
    before[0].run.write_config(before[0].config)
    key, value = change
    overrides = {**STEPS, "teacher.path": str(tmp_path / "teacher"), key: value}
    with pytest.raises(UserError, match=r"config.yaml: `train\..*` is another than the study's"):
        plan(study_file(tmp_path, tmp_path / "teacher", overrides=overrides))


def test_overrides_are_set_layer_after_layer(tmp_path: Path) -> None:
    overrides = {**STEPS, "teacher.path": str(tmp_path), "sample.num_images": 30}
    conditions = {"few": {"sample": {"num_inference_steps": 3}}}
    variants = {"kd": {"sample.num_images": 48}, "vkd": {}}
    planned, study = plan(
        study_file(
            tmp_path, tmp_path, overrides=overrides, conditions=conditions, variants=variants, seeds=[7]
        )
    )
    found = [(each.config.sample, each.config.seed) for each in planned]
    assert [(s.num_inference_steps, s.num_images, s.seed, seed) for s, seed in found] == [
        (3, 48, 7, 7),
        (3, SampleConfig().num_images, 7, 7),  # the section of the condition is all of it
    ]
    assert study.varied == {"num_inference_steps", "num_images"}


def test_what_changes_no_image_may_change(tmp_path: Path) -> None:
    planned, _ = plan(study_file(tmp_path, tmp_path))
    planned[0].run.path.mkdir(parents=True)
    planned[0].run.write_config(planned[0].config)
    overrides = {**STEPS, "teacher.path": str(tmp_path), "sample.batch_size": 5}
    plan(study_file(tmp_path, tmp_path, overrides=overrides))


def test_a_run_that_was_saved_early_is_not_complete(tmp_path: Path) -> None:
    planned, study = plan(study_file(tmp_path, tmp_path / "teacher"))
    run = planned[0].run
    run.path.mkdir(parents=True)
    write_summary(run.path, "distill", 5)
    run.evaluation_file.parent.mkdir()
    run.evaluation_file.write_text('{"fid": 1.0}')
    assert not planned[0].is_complete and not collect(study, planned, read_known(study, planned)).outcomes
    job = runner._missing(run, planned[0].config, ["distill"])
    assert [line[0] for line in job] == ["distill", "sample", "evaluate"]


def test_what_came_out_before_a_run_went_on_does_not_count(tmp_path: Path) -> None:
    planned, study = plan(study_file(tmp_path, tmp_path / "teacher"))
    first, config = planned[0], planned[0].config
    run = first.run
    run.path.mkdir(parents=True)
    write_summary(run.path, "distill", config.train.max_steps)
    run.metrics_file.touch()
    write_json(run.environment_file, {"commit": None})

    def measured(sampled: int, evaluated: int) -> list[str]:
        """The commands that are missing where samples and metrics are of these steps."""
        write_json(run.samples / "sampling.json", {"num_images": 24, "protocol": {"steps_trained": sampled}})
        write_json(run.evaluation_file, {"fid": 1.0, "protocol": {"steps_trained": evaluated}})
        return [line[0] for line in runner._missing(run, config, ["distill"])]

    study = study.model_copy(update={"after_seconds": []})
    assert measured(10, 10) == [] and len(collect(study, planned, read_known(study, planned)).outcomes) == 1
    assert measured(5, 5) == ["sample", "evaluate"]
    assert not first.is_complete and not collect(study, planned, read_known(study, planned)).outcomes
    assert measured(10, 5) == ["evaluate"]


def test_runs_of_two_teachers_at_one_place_are_no_study(tmp_path: Path) -> None:
    planned, study = plan(study_file(tmp_path, tmp_path / "teacher"))
    for each, digest in zip(planned, "aaba", strict=True):
        each.run.path.mkdir(parents=True)
        write_json(each.run.inputs_file, {"data": "x", "teacher.path": digest})
    with pytest.raises(UserError, match=r"seed-1/inputs\.json: what `teacher\.path` names was another when"):
        collect(study, planned, read_known(study, planned))
    write_json(planned[2].run.inputs_file, {"data": "x", "teacher.path": "a"})
    collect(study, planned, read_known(study, planned))


def plan(file: Path) -> tuple[list[Planned], StudyConfig]:
    study = read_config(file, StudyConfig)
    return plan_runs(study, Path(study.output)), study
