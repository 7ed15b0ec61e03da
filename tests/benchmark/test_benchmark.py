"""`benchmark` through the command line: what it tells of runs, pipelines and models, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import command, sets
from diffusers import ModelMixin
from random_runs import finished_run, random_dit_pipeline
from small_models import small_dit
from tiny_pipelines import PIPELINES, SIZE
from torch import nn

from shd_diffusion.benchmark.candidates import PROMPT
from shd_diffusion.benchmark.run_benchmark import Plan, _sampling, benchmark
from shd_diffusion.config import SampleConfig

SHORT = ["--rounds", 3, "--batch-size", "2,1"]
STEPS = sets("sample.num_inference_steps=3")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of four heads against one of two, and a pipeline beside them."""
    root = tmp_path_factory.mktemp("benchmark")
    teacher, student = finished_run(root / "teacher", heads=4), finished_run(root / "student", heads=2)
    random_dit_pipeline(heads=3).save_pretrained(root / "pipeline")
    code, printed, errors = command("benchmark", teacher, student, root / "pipeline", *SHORT, *STEPS)
    assert code == 0, errors
    assert "call ×1" in errors and "image ×2" in errors and "x times teacher" in errors
    results: dict[str, Any] = json.loads(printed)
    return results | {"root": root}


def test_sizes_are_told_against_the_first(found: dict[str, Any]) -> None:
    models = found["models"]
    assert list(models) == ["teacher", "student", "pipeline"]
    for name, heads in (("teacher", 4), ("student", 2), ("pipeline", 3)):
        each, model = models[name], small_dit(heads, layers=1)
        assert each["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert each["calls_per_image"] == 3 and each["macs_image"] == 3 * each["macs_call"]
        for key in ("parameters", "macs_call", "macs_image"):
            assert each["ratios"][key] == each[key] / models["teacher"][key]
    assert models["student"]["ratios"]["macs_call"] < models["pipeline"]["ratios"]["macs_call"] < 1


def test_times_are_told_with_their_spread(found: dict[str, Any]) -> None:
    for name, each in found["models"].items():
        kinds = [(timing["what"], timing["batch_size"]) for timing in each["timings"]]
        assert kinds == [("call", 1), ("image", 1), ("call", 2), ("image", 2)]
        weights = 4 * each["parameters"]
        for timing in each["timings"]:
            seconds = timing["seconds"]
            low, high = seconds["quartiles"]
            assert 0 < low <= seconds["median"] <= high
            assert timing["per_second"] == pytest.approx(timing["batch_size"] / seconds["median"])
            assert timing["peak_bytes"] > weights
            if name == "teacher":
                assert timing["ratio"] == {"median": 1.0, "quartiles": [1.0, 1.0]}
    calls = [
        timing["peak_bytes"] for timing in found["models"]["teacher"]["timings"] if timing["what"] == "call"
    ]
    assert calls[0] < calls[1]  # of one sample, and of two


def test_runs_keep_what_they_cost_and_pipelines_are_left_alone(found: dict[str, Any]) -> None:
    root = found["root"]
    for name in ("teacher", "student"):
        kept = json.loads((root / name / "evaluation" / "benchmark.json").read_text())
        assert kept == found["models"][name] | {
            "benchmark": found["benchmark"], "name": name, "environment": found["environment"],
        }  # fmt: skip
    assert not (root / "pipeline" / "evaluation").exists()
    how = found["benchmark"]
    assert how["first"] == "teacher" and how["memory"] == "counted" and how["rounds"] == 3
    assert how["sampling"]["num_inference_steps"] == 3 and how["sampling"]["dtype"] == "float32"


def test_the_median_is_numpys_of_the_rounds(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of times that the turns tell."""
    rounds = list(np.random.default_rng(0).uniform(1, 2, 5))
    monkeypatch.setattr(
        "shd_diffusion.benchmark.measure.take_turns",
        lambda candidates, *_, **__: dict.fromkeys(candidates, rounds),
    )
    monkeypatch.setattr("shd_diffusion.benchmark.measure._repeats", lambda run: 4)
    results = benchmark([str(run)], Plan(batch_sizes=(2,), rounds=5, images=False))
    (timing,) = results["models"]["run"]["timings"]
    low, middle, high = np.quantile(rounds, [0.25, 0.5, 0.75]) / 4  # four calls a turn
    assert timing["seconds"]["median"] == pytest.approx(middle)
    assert list(timing["seconds"]["quartiles"]) == pytest.approx([low, high])
    assert timing["per_second"] == pytest.approx(2 / middle)


def test_a_model_alone_is_called_and_samples_nothing(run: Path, tmp_path: Path) -> None:
    small_dit(3).save_pretrained(tmp_path / "model")
    output = tmp_path / "costs.json"
    options = ["--rounds", 1, "--batch-size", 1, "--dtype", "bfloat16", "--output", output]
    code, printed, errors = command("benchmark", tmp_path / "model", run, *options)
    assert code == 0 and printed == "", errors
    results = json.loads(output.read_text())
    assert results["benchmark"]["sampling"]["dtype"] == "bfloat16"
    for each in results["models"].values():
        assert [timing["what"] for timing in each["timings"]] == ["call"]
        assert each["timings"][0]["peak_bytes"] < 4 * each["parameters"]  # weights of two bytes
    assert results["models"]["model"]["macs_image"] is None
    assert (run / "evaluation" / "benchmark.json").exists()


@pytest.mark.parametrize("family", ["sd1.5", "flux-dev"])
def test_a_text_pipeline_is_called_as_it_calls_itself(family: str, tmp_path: Path) -> None:
    """A denoiser's call is one sample without guidance; an image has all that the pipeline's own call does."""
    pipeline = PIPELINES[family]()
    pipeline.save_pretrained(tmp_path / family)
    plan = Plan(batch_sizes=(2,), rounds=1, image_size=SIZE[0])
    results = benchmark(
        [str(tmp_path / family)], plan, ["sample.num_inference_steps=2", "sample.dtype=float32"]
    )
    (each,) = results["models"].values()
    assert each["calls_per_image"] == {"sd1.5": 4, "flux-dev": 2}[family]  # Flux-dev is told its guidance
    assert each["macs_image"] > each["calls_per_image"] * each["macs_call"]  # text encoders and the VAE
    assert results["benchmark"]["prompt"] == PROMPT
    model = getattr(pipeline, "unet", None) or pipeline.transformer
    assert each["parameters"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{run}"], "is given twice; give each model once"),
        (
            ["{run}", "nobody here"],
            "nobody here: no model here; give a run, a diffusers pipeline or model folder",
        ),
        (
            ["{run}", "--batch-size", "1,x"],
            "--batch-size 1,x: give one or more numbers from 1 on, such as 1,16",
        ),
        (
            ["{run}", "--batch-size", "0,2"],
            "--batch-size 0,2: give one or more numbers from 1 on, such as 1,16",
        ),
        (["{run}", "--device", "abacus"], "--device abacus: cannot be used here ("),
        (["{run}", "--device", "meta"], "--device meta: computes nothing; give cpu or an accelerator"),
        (["{run}", "--attention", "nativ"], "key `sample.attention` is nativ; did you mean `native`?"),
        (
            ["{run}", "--attention", "flex"],
            "lets no backend be chosen for a DiTTransformer2DModel; remove it",
        ),
        (["{run}", "--image-size", "64"], "--image-size: is for text-to-image pipelines"),
        (["{run}", "--set", "sample.steps=3"], "--set: unknown key `sample.steps`"),
        (
            ["{run}", "--compile"],
            "16 samples cannot be denoised on cpu in float32, compiled (no compiler); choose",
        ),
        (["{run}", "--output", "{run}"], "is a folder; give a file"),
        (["{run}", "--output", "{run}/config.yaml"], "would be replaced, but is no benchmark"),
        (["{run}", "--output", "{run}/summary.json"], "would be replaced, but is no benchmark"),
        (["{unfinished}"], "its training has not ended"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_measured(
    arguments: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_later(model: nn.Module) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("no\ncompiler")

        model.register_forward_pre_hook(fail)

    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(ModelMixin, "compile", compile_later)
    monkeypatch.setattr("shd_diffusion.benchmark.run_benchmark.count_candidate", measured)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((run / "config.yaml").read_text())
    told = [argument.format(run=run, unfinished=unfinished) for argument in arguments]
    code, printed, errors = command("benchmark", *told)
    lines = [line for line in errors.splitlines() if line.strip() and "Loading" not in line]
    assert code == 2 and printed == "" and len(lines) == 1, errors
    assert lines[0].startswith("error: ") and message in lines[0], lines
    assert not (run / "evaluation").exists()


def test_what_does_not_fit_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("shd_diffusion.benchmark.candidates.predict", full)
    code, _, errors = command("benchmark", run)
    assert code == 2 and "16 samples cannot be denoised on cpu in float32 (CUDA out of memory.)" in errors


def test_a_pipeline_reads_prompts_as_its_run_has_learnt_from_them() -> None:
    prepare = SimpleNamespace(prompt_arguments={"max_sequence_length": 128, "size": 1})
    sample = SampleConfig(pipeline_arguments={"size": 2})
    config = SimpleNamespace(sample=sample, prepare=prepare, within=None)
    run: Any = SimpleNamespace(read_config=lambda: config)
    plan: Any = SimpleNamespace(image_size=None)
    found, _ = _sampling([run], plan, [])
    assert found.pipeline_arguments == {"max_sequence_length": 128, "size": 2}
