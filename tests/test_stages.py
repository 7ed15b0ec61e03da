"""Every stage, short but real, through the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import DISTILL_CONFIG, FEW_IMAGES, SHORT, TEACHER_CONFIG, command, sets, start
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.sampling import ClassConditionalPipeline


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors")


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_what_it_should(runs: Path) -> None:
    run = runs / "kd-shd"
    expected = ["config.yaml", "environment.json", "metrics.jsonl", "summary.json", "attention.safetensors"]
    expected += ["checkpoints/step-00000010", "checkpoints/step-00000020", "pipeline/model_index.json"]
    expected += ["samples/000023.png", "samples/sampling.json", "evaluation/metrics.json"]
    assert [name for name in expected if not (run / name).exists()] == []
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["heads"], summary["teacher_heads"], summary["steps"], summary["images"]) == (
        5,
        12,
        20,
        320,
    )
    assert summary["parameters"] == sum(tensor.numel() for tensor in weights(run).values())


def test_every_term_is_logged_with_its_weight_and_share(runs: Path) -> None:
    entries = log(runs / "kd-shd")
    assert [entry["step"] for entry in entries] == [5, 10, 15, 20]
    for entry in entries:
        assert entry["images"] == entry["step"] * 16 and entry["seconds_per_step"] > 0
        assert set(entry["terms"]) == {"denoise", "output", "shd"}
        for name, weight in (("denoise", 1.0), ("output", 1.0), ("shd", 20.0)):
            term = entry["terms"][name]
            assert term["weighted"] == pytest.approx(weight * term["value"])
            assert term["share"] == pytest.approx(term["weighted"] / entry["loss"])
        assert sum(term["weighted"] for term in entry["terms"].values()) == pytest.approx(entry["loss"])


def test_figures_are_there_with_their_protocol(runs: Path) -> None:
    figures = json.loads((runs / "teacher" / "evaluation" / "metrics.json").read_text())
    names = [
        "fid",
        "inception_score_mean",
        "inception_score_std",
        "kid_mean",
        "kid_std",
        "precision",
        "recall",
    ]
    assert all(isinstance(figures[name], float) for name in names)
    assert figures["protocol"]["num_inference_steps"] == 3 and figures["protocol"]["guidance_scale"] == 1.0


def test_attention_of_teacher_squeezed_and_student_is_kept(runs: Path) -> None:
    with safe_open(runs / "kd-shd" / "attention.safetensors", "pt") as file:
        blocks = json.loads(file.metadata()["description"])["blocks"]
        assert len(blocks) == 6
        for block in blocks:
            name = block["student"]
            for part, heads in (("teacher", 12), ("squeezed", 5), ("student", 5)):
                maps = file.get_tensor(f"{name}/{part}")
                assert maps.shape == (heads, 16, 16)
                torch.testing.assert_close(maps.sum(-1), torch.ones(heads, 16))
            alpha = file.get_tensor(f"{name}/coefficients")
            assert alpha.shape[1] == 7 and alpha.min() >= 0 and alpha.max() <= 1  # 12 -> 6 -> 5


def test_the_teacher_is_not_touched(runs: Path) -> None:
    before = weights(runs / "teacher")
    pipeline = ClassConditionalPipeline.from_pretrained(runs / "teacher" / "pipeline")
    assert all(torch.equal(value, before[name]) for name, value in pipeline.denoiser.state_dict().items())


def test_the_same_command_on_a_complete_run_changes_nothing(runs: Path) -> None:
    run = runs / "teacher"
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert command("train-teacher", TEACHER_CONFIG, "--output", run, *sets(*SHORT))[0] == 0
    assert command("sample", run, *sets(*FEW_IMAGES))[0] == 0
    changed = [p.name for p, when in files.items() if p.stat().st_mtime_ns != when]
    assert changed == []


def test_samples_and_reports_go_where_they_are_told_to(runs: Path, tmp_path: Path) -> None:
    images, run = tmp_path / "images", runs / "teacher"
    assert command("sample", run, "--output", images, *sets(*FEW_IMAGES))[0] == 0
    theirs = {path.name: path.read_bytes() for path in (run / "samples").glob("*.png")}
    assert {path.name: path.read_bytes() for path in images.glob("*.png")} == theirs
    code, printed, _ = command(
        "evaluate", images, "--reference", "digits", "--extractor", "digits-classifier"
    )
    kept = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert code == 0 and json.loads(printed)["fid"] == pytest.approx(kept["fid"], rel=1e-9)
    assert command("sample", run, runs / "kd-shd", "--output", images)[0] == 2
    assert command("report", run, "--output", tmp_path / "pages")[0] == 0
    assert command("report", run, "--output", tmp_path / "mine.html")[0] == 0
    assert (tmp_path / "pages" / "report.html").exists() and (tmp_path / "mine.html").exists()


def test_resume_is_bit_identical(runs: Path, tmp_path: Path) -> None:
    """A run that lost everything after its first checkpoint ends with the same weights and the same log."""
    run = tmp_path / "kd-shd"
    shutil.copytree(runs / "kd-shd", run)
    shutil.rmtree(run / "checkpoints" / "step-00000020")
    shutil.rmtree(run / "pipeline")
    (run / "summary.json").unlink()
    overrides = sets(*SHORT, f"teacher.path={runs / 'teacher'}")
    assert command("distill", DISTILL_CONFIG, "--output", run, *overrides)[0] == 0
    before, after = weights(runs / "kd-shd"), weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    without_time = [{k: v for k, v in e.items() if k != "seconds_per_step"} for e in log(run)]
    assert without_time == [
        {k: v for k, v in e.items() if k != "seconds_per_step"} for e in log(runs / "kd-shd")
    ]


def test_terms_of_weight_zero_are_left_out(runs: Path, tmp_path: Path) -> None:
    overrides = sets(*SHORT, f"teacher.path={runs / 'teacher'}", "losses.shd.weight=0", "train.max_steps=2")
    assert command("distill", DISTILL_CONFIG, "--output", tmp_path / "kd", *overrides)[0] == 0
    assert set(log(tmp_path / "kd")[-1]["terms"]) == {"denoise", "output"}


def test_variants_of_one_seed_start_alike(runs: Path, tmp_path: Path) -> None:
    """Without an update yet, the denoising term of the first step is the same with and without a teacher."""
    overrides = sets(*SHORT, f"teacher.path={runs / 'teacher'}", "train.max_steps=1")
    for name, weight in (("none", 0), ("shd", 5)):
        more = sets(f"losses.shd.weight={weight}", f"losses.output.weight={min(weight, 1)}")
        assert command("distill", DISTILL_CONFIG, "--output", tmp_path / name, *overrides, *more)[0] == 0
    first, second = (log(tmp_path / name)[0]["terms"]["denoise"]["value"] for name in ("none", "shd"))
    assert first == second


def test_ctrl_c_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["train-teacher", TEACHER_CONFIG, "--output", run, *sets(*SHORT, "train.max_steps=100000")]
    process = start(*arguments)
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-00000010").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors
    assert list((run / "checkpoints").glob("step-*"))


BAD = {
    "unknown key": (["train.max_step=3"], ["distill.yaml", "train.max_step", "max_steps"]),
    "wrong type": (["train.batch_size=big"], ["distill.yaml", "train.batch_size", "integer"]),
    "too many heads": (
        ["student.arguments.num_attention_heads=13"],
        ["distill.yaml", "losses.shd", "12", "13"],
    ),
    "unknown class": (["student.class=NoModel"], ["distill.yaml", "student", "NoModel"]),
    "unknown argument": (["student.arguments.depth=3"], ["distill.yaml", "student", "depth"]),
    "other classes": (
        ["student.arguments.num_embeds_ada_norm=7"],
        ["distill.yaml", "student", "10", "7"],
    ),
    "no teacher": (["teacher.path=nowhere/at/all"], ["nowhere/at/all", "teacher.path"]),
    "unknown scheduler": (["sample.scheduler=Nope"], ["distill.yaml", "sample.scheduler", "Nope"]),
    "another objective": (
        ["diffusion.objective=v_prediction"],
        ["distill.yaml", "diffusion.objective", "v_prediction", "epsilon"],
    ),
    "another noise": (
        ["diffusion.beta_end=0.03"],
        ["distill.yaml", "diffusion.beta_end", "0.03", "0.02"],
    ),
    "another length": (
        ["diffusion.num_train_timesteps=100"],
        ["distill.yaml", "diffusion.num_train_timesteps", "100", "1000"],
    ),
    "too many processes": (["train.batch_size=4", "train.num_processes=3"], ["train.num_processes", "3"]),
    "infinite": (["train.learning_rate=.inf"], ["distill.yaml", "train.learning_rate", "finite"]),
    "no heads": (["student.arguments.num_attention_heads=0"], ["distill.yaml", "student"]),
    "patches that do not fit": (["student.arguments.patch_size=3"], ["distill.yaml", "student"]),
    "a seed that is too large": (["seed=99999999999999999999"], ["distill.yaml", "seed"]),
    "a plan of other heads": (
        ["losses.shd.pairing=[[[0, 1], [2, 3]]]"],
        ["distill.yaml", "round 0 of the plan"],
    ),
    "three at once": (
        ["losses.shd.pairing=[[[0,1,2],[3,4,5],[6,7,8],[9,10],[11]]]"],
        ["distill.yaml", "a progressive merge takes two heads"],
    ),
    "steps without a term": (
        ["losses.denoise.weight=0", "losses.output.weight=0", "losses.shd.every=2"],
        ["distill.yaml", "losses", "steps without any term"],
    ),
    "a kind of attention that there is none of": (
        ["losses.shd.kinds=[cross]"],
        [
            "distill.yaml",
            "losses.shd",
            "`kinds` names cross-attention, of which the student has none",
            "it has self",
        ],
    ),
    "rows of no joint attention": (
        ["losses.features.weight=1", "losses.features.streams=[text]"],
        ["distill.yaml", "losses.features", "`streams` names text, but no joint attention"],
    ),
    "after all of it": (["losses.shd.after=1"], ["distill.yaml", "losses.shd.after", "less than 1"]),
    "timesteps backwards": (
        ["losses.shd.timesteps=[800, 200]"],
        ["distill.yaml", "losses.shd", "[800, 200]"],
    ),
    "timesteps beyond the process": (
        ["losses.shd.timesteps=[5000, 9000]"],
        ["distill.yaml", "losses.shd.timesteps", "0 to 999"],
    ),
    "more heads than fit a machine": (
        ["student.arguments.num_attention_heads=10000000"],
        ["distill.yaml", "student", "GB, more than this machine has"],
    ),
    "validation by other features": (
        ["train.validation.every=5", "evaluate.extractor=fashion-mnist-classifier"],
        ["distill.yaml", "evaluate.extractor", "32×32"],
    ),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_bad_input_is_one_line_and_writes_nothing(case: str, runs: Path, tmp_path: Path) -> None:
    overrides, says = BAD[case]
    arguments = sets(*SHORT, f"teacher.path={runs / 'teacher'}", *overrides)
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", tmp_path / "run", *arguments)
    assert code == 2
    message = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and all(part in message[0] for part in says), errors
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_teacher_is_named(tmp_path: Path) -> None:
    arguments = sets(*SHORT, f"teacher.path={tmp_path}")
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", tmp_path / "run", *arguments)
    assert code == 2 and str(tmp_path) in errors and "teacher.path" in errors


def test_a_teacher_that_cannot_be_captured_is_named(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32,), num_class_embeds=11,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    arguments = sets(*SHORT, f"teacher.path={tmp_path / 'unet'}")
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", tmp_path / "run", *arguments)
    assert code == 2 and "the student has self, the teacher none" in errors
    assert "losses.shd" in errors and str(tmp_path / "unet") in errors
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_config_is_left_alone(runs: Path) -> None:
    run = runs / "teacher"
    before = (run / "config.yaml").read_bytes()
    code, _, errors = command("train-teacher", TEACHER_CONFIG, "--output", run, *sets(*SHORT, "seed=1"))
    assert code == 2 and "`seed`" in errors and "config.yaml" in errors and "--output" in errors
    assert (run / "config.yaml").read_bytes() == before


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    code, _, errors = command("train-teacher", TEACHER_CONFIG, "--output", tmp_path, *sets(*SHORT))
    assert code == 2 and str(tmp_path) in errors
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("stage", ["sample", "evaluate", "report"])
def test_a_folder_that_is_no_run_is_named(stage: str, tmp_path: Path) -> None:
    code, _, errors = command(stage, tmp_path / "nothing")
    assert code == 2 and "nothing" in errors
    assert not (tmp_path / "nothing").exists()


def test_a_run_does_not_go_on_from_another_teacher(runs: Path, tmp_path: Path) -> None:
    """A teacher that was trained anew in the same folder is noticed; so are other images."""
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(runs / "teacher", teacher)
    arguments = ["distill", DISTILL_CONFIG, "--output", run, *sets(*SHORT, f"teacher.path={teacher}")]
    assert command(*arguments, *sets("train.max_steps=1"))[0] == 0
    file = teacher / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors"
    changed = load_file(file)
    next(iter(changed.values())).mul_(1.01)
    save_file(changed, file, metadata={"format": "pt"})
    code, _, errors = command(*arguments, *sets("train.max_steps=2"))
    assert code == 2 and f"what `teacher.path` names ({teacher}) has changed since this run began" in errors
    inputs = json.loads((run / "inputs.json").read_text())
    (run / "inputs.json").write_text(json.dumps(inputs | {"data": "other"}))
    code, _, errors = command(*arguments, *sets("train.max_steps=2"))
    assert code == 2 and "what `data` names has changed" in errors


def test_token_grids_that_do_not_divide_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """12 px in patches of 4 and 3: 9 tokens and 16."""
    (tmp_path / "images").mkdir()
    for index in range(4):
        Image.new("RGB", (12, 12), (60 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    arguments = ["in_channels=3", "out_channels=3", "sample_size=12", "num_embeds_ada_norm=1", "num_layers=1"]
    (tmp_path / "images" / "only").mkdir()
    for image in (tmp_path / "images").glob("*.png"):
        image.rename(tmp_path / "images" / "only" / image.name)
    data = ["data.name=image_folder", f"data.path={tmp_path / 'images'}", "data.image_size=12", *SHORT]
    data += ["train.max_steps=1", "train.batch_size=2", "evaluate.extractor=inception-v3-compat"]
    teacher = sets(*data, *(f"model.arguments.{part}" for part in [*arguments, "patch_size=4"]))
    assert command("train-teacher", TEACHER_CONFIG, "--output", tmp_path / "teacher", *teacher)[0] == 0
    student = [f"student.arguments.{part}" for part in [*arguments, "patch_size=3"]]
    overrides = sets(*data, *student, f"teacher.path={tmp_path / 'teacher'}")
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", tmp_path / "run", *overrides)
    assert code == 2 and "losses.shd" in errors and "16 and 9 tokens" in errors, errors
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_image_size_is_refused(runs: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(runs / "teacher", teacher)
    index = teacher / "pipeline" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"sample_shape": [1, 16, 16]}))
    arguments = sets(*SHORT, f"teacher.path={teacher}")
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", tmp_path / "run", *arguments)
    assert code == 2 and "(1, 16, 16)" in errors and "(1, 8, 8)" in errors and not (tmp_path / "run").exists()


def test_the_command_line_is_there_before_torch_is() -> None:
    """Its guard against Ctrl-C holds while torch and diffusers are imported, and `--help` does not wait for them."""
    seen = "import sys, shd_diffusion.cli; print(*{'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", seen], check=True, capture_output=True).stdout == b"\n"


def test_the_command_of_a_launch_file_is_that_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/pipelines/distill.py", "a.yaml"])
    assert describe_environment()["command"] == "pipelines/distill.py a.yaml"
    monkeypatch.setattr("sys.argv", ["/usr/bin/shd-diffusion", "distill", "a.yaml"])
    assert describe_environment()["command"] == "shd-diffusion distill a.yaml"


def test_a_run_goes_on_where_its_teacher_has_moved(runs: Path, tmp_path: Path) -> None:
    moved, run = tmp_path / "moved", tmp_path / "run"
    shutil.copytree(runs / "teacher", moved)
    shutil.copytree(runs / "kd-shd", run)
    arguments = ["distill", DISTILL_CONFIG, "--output", run]
    settings = sets(*SHORT, f"teacher.path={moved}")
    code, _, errors = command(*arguments, *settings)
    assert code == 0 and "complete, nothing to do" in errors
    assert RunFolder(run).read_config().teacher.path == str(moved)
    code, _, errors = command(*arguments, *settings, *sets("train.max_steps=21"))
    assert code == 0 and "another run" not in errors and RunFolder(run).read_summary().steps == 21
    measured = (run / "evaluation" / "metrics.json").read_bytes()
    code, _, errors = command("evaluate", run)  # the samples are older
    assert code == 2 and "its images are of step 20, and the run has come to 21 since; delete" in errors
    assert (run / "evaluation" / "metrics.json").read_bytes() == measured

    file = moved / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors"
    changed = load_file(file)
    next(iter(changed.values())).mul_(1.01)
    save_file(changed, file, metadata={"format": "pt"})
    other = tmp_path / "other"
    moved.rename(other)  # a complete run has not learnt from this one
    code, _, errors = command(*arguments, *sets(*SHORT, f"teacher.path={other}", "train.max_steps=21"))
    assert code == 2 and f"what `teacher.path` names ({other}) has changed" in errors


def test_a_run_that_began_from_random_weights_did_not_begin_from_others(runs: Path, tmp_path: Path) -> None:
    """Nor the reverse: where `student.pretrained` lies may change, but not whether there is one."""
    alone, given = tmp_path / "alone.yaml", tmp_path / "given.yaml"
    text = DISTILL_CONFIG.read_text()
    start, end = text.index("student:"), text.index("losses:")
    alone.write_text(f"{text[:start]}student: {{}}\n\n{text[end:]}")
    given.write_text(f"{text[:start]}student:\n  pretrained: {runs / 'teacher'}\n\n{text[end:]}")
    settings = sets(*SHORT, f"teacher.path={runs / 'teacher'}", "train.max_steps=1")
    for first, then, says in ((alone, given, "is None there"), (given, alone, "None now")):
        run = RunFolder(tmp_path / first.stem)
        assert command("distill", first, "--output", run.path, *settings)[0] == 0
        before = run.config_file.read_bytes()
        for more in ([], sets("train.max_steps=2")):
            code, _, errors = command("distill", then, "--output", run.path, *settings, *more)
            assert code == 2 and "`student.pretrained`" in errors and says in errors
        assert run.config_file.read_bytes() == before
    inputs = json.loads(run.inputs_file.read_text())
    del inputs["student.pretrained"]
    with pytest.raises(UserError, match=r"what `student\.pretrained` names \(.*\) has changed"):
        run.check_inputs(run.read_config(), inputs)


def test_a_pipeline_that_was_deleted_is_made_anew_from_the_last_checkpoint(
    runs: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(runs / "teacher", run.path)
    expected = weights(run.path)
    shutil.rmtree(run.pipeline)
    train = ["train-teacher", TEACHER_CONFIG, "--output", run.path, *sets(*SHORT)]
    for stage in ("sample", "benchmark", "push"):
        code, _, errors = command(stage, run.path, *(["me/model"] if stage == "push" else []))
        assert (
            code == 2 and f"{run.pipeline}: has no pipeline any more; the command of its training" in errors
        )
    assert command(*train)[0] == 0
    found = weights(run.path)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    for folder in (run.pipeline, run.checkpoints):
        shutil.rmtree(folder)
    code, _, errors = command(*train)
    assert code == 2 and f"nor has {run.checkpoints} its last step" in errors
    assert run.summary_file.exists() and run.metrics_file.exists()


@pytest.mark.parametrize(
    ("stage", "key"), [("evaluate", "sample.num_images=8"), ("sample", "train.max_steps=30")]
)
def test_an_override_without_effect_is_refused(stage: str, key: str, runs: Path) -> None:
    code, _, errors = command(stage, runs / "kd-shd", *sets(key))
    assert code == 2 and errors.startswith(f"error: --set {key}: has no effect, only `data`")


def test_what_is_for_one_process_is_refused_in_several(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = command("report", runs / "teacher")
    assert code == 2 and "2 processes were launched, but `report` is for one" in errors
