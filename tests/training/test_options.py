"""What a config can ask of the optimisation, each by what it changes and what it must not change."""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DISTILL_CONFIG, TEACHER_CONFIG, command, sets
from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import nn
from torch._inductor import config as inductor

from shd_diffusion.config import TrainConfig
from shd_diffusion.training import run as run_module
from shd_diffusion.training.launch import make_accelerator
from shd_diffusion.training.objectives import TrainingLoss

SHORT = ["train.max_steps=3", "train.batch_size=4", "train.log_every=1", "train.warmup_steps=0"]
TEACHER = ["model.arguments.num_layers=2", "model.arguments.num_attention_heads=4"]
STUDENT = ["student.arguments.num_layers=2", "student.arguments.num_attention_heads=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the runs `teacher` and `plain`."""
    folder = tmp_path_factory.mktemp("options")
    assert (
        command("train-teacher", TEACHER_CONFIG, "--output", folder / "teacher", *sets(*SHORT, *TEACHER))[0]
        == 0
    )
    distill(folder, folder / "plain")
    return folder


def distill(folder: Path, run: Path, *overrides: str) -> Path:
    arguments = sets(*SHORT, *STUDENT, f"teacher.path={folder / 'teacher'}", *overrides)
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", run, *arguments)
    assert code == 0, errors
    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors")


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in log(run)]


def test_gradient_checkpointing_changes_nothing(folder: Path, tmp_path: Path) -> None:
    run = distill(folder, tmp_path / "run", "train.gradient_checkpointing=true")
    ours, theirs = weights(run), weights(folder / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(run) == losses(folder / "plain")


def test_compiled_it_is_the_same_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are real, with the capture in them; only the code generator is left out, which takes minutes."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(ModelMixin, "compile", partialmethod(nn.Module.compile, backend=backend))
    run = distill(folder, tmp_path / "run", "train.compile=true")
    assert graphs
    assert losses(run) == pytest.approx(losses(folder / "plain"), rel=1e-6)


def test_a_loss_that_cannot_be_compiled_names_the_keys(folder: Path, tmp_path: Path) -> None:
    arguments = sets(*SHORT, *STUDENT, f"teacher.path={folder / 'teacher'}", "losses.shd.compile=true")
    # by torch's own means: what pytest restores of its configuration is not what was there
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "none")), "force_disable_caches": True}):
        code, _, errors = command("distill", DISTILL_CONFIG, "--output", tmp_path / "run", *arguments)
    assert code == 2 and "`losses.shd.compile`" in errors and "C++ compiler" in errors


def test_bf16_computes_in_it_and_keeps_the_weights_in_float32(folder: Path, tmp_path: Path) -> None:
    run = distill(folder, tmp_path / "run", "train.mixed_precision=bf16")
    assert losses(run) == pytest.approx(losses(folder / "plain"), rel=1e-2)
    assert losses(run) != losses(folder / "plain")
    assert {tensor.dtype for tensor in weights(run).values()} == {torch.float32}


def test_tf32_holds_for_the_run_that_allows_it(tmp_path: Path) -> None:
    for allowed, precision in ((True, "high"), (False, "highest")):
        make_accelerator(TrainConfig(max_steps=1, batch_size=1, allow_tf32=allowed), tmp_path)
        assert torch.get_float32_matmul_precision() == precision


def test_a_precision_that_the_machine_lacks_is_an_error(folder: Path, tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("accelerators have fp16")
    arguments = sets(*SHORT, *STUDENT, f"teacher.path={folder / 'teacher'}", "train.mixed_precision=fp16")
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", tmp_path / "run", *arguments)
    assert code == 2 and "train.mixed_precision" in errors and "bf16" in errors
    assert not (tmp_path / "run").exists()


def test_gradients_are_clipped_and_their_norm_is_logged_unclipped(folder: Path, tmp_path: Path) -> None:
    """A gradient far below Adam's ε moves nothing."""
    run = distill(folder, tmp_path / "run", "train.max_grad_norm=1e-13")
    plain = folder / "plain"
    assert log(run)[0]["gradient_norm"] == log(plain)[0]["gradient_norm"] > 0.01
    assert losses(run)[0] == losses(plain)[0]
    at_start = weights(distill(folder, tmp_path / "start", "train.learning_rate=1e-30"))
    moved = [
        max((part[name] - at_start[name]).abs().max() for name in at_start)
        for part in (weights(run), weights(plain))
    ]
    assert moved[0] < 1e-6 and moved[1] > 1e-3


def test_trackers_get_every_figure(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = distill(folder, tmp_path / "run", "train.trackers=[tensorboard]")
    events = EventAccumulator(str(run / "trackers" / "shd-diffusion"))
    events.Reload()
    for key in ("loss", "terms.shd.value", "terms.output.share", "learning_rate", "gradient_norm"):
        assert [event.step for event in events.Scalars(key)] == [1, 2, 3]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(run))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_teacher_teaches_and_nothing_else(
    dtype: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen, in evaluation mode, as wide as asked for; no part of the optimiser, the average or a checkpoint."""
    original, seen = TrainingLoss.__call__, []

    def watched(self: TrainingLoss, *arguments: Any) -> dict[str, torch.Tensor]:
        seen.append(self.teacher)
        assert not any(module.training for module in self.teacher.modules())
        assert {parameter.dtype for parameter in self.teacher.parameters()} == {getattr(torch, dtype)}
        return original(self, *arguments)

    monkeypatch.setattr(TrainingLoss, "__call__", watched)
    run = distill(folder, tmp_path / "run", f"teacher.dtype={dtype}")
    assert losses(run) == pytest.approx(losses(folder / "plain"), rel=1e-2)
    assert all(p.grad is None and not p.requires_grad for p in seen[-1].parameters())
    taught = load_file(folder / "teacher" / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(p, taught[n].to(p.dtype)) for n, p in seen[-1].named_parameters())

    checkpoint, student = run / "checkpoints" / "step-00000003", weights(run)
    model, average, optimizer = (
        load_file(checkpoint / f"{name}.safetensors") for name in ("model", "ema", "optimizer")
    )
    assert {name: tensor.shape for name, tensor in model.items() if name in student} == {
        name: tensor.shape for name, tensor in student.items()
    }
    assert len(average) == len(student) and len({name.split("/")[0] for name in optimizer}) == len(student)
    assert {path.name for path in checkpoint.iterdir()} == {
        *(f"{name}.safetensors" for name in ("model", "ema", "optimizer", "loss")), "manifest.json",
    }  # fmt: skip


def test_the_divergence_is_logged_block_by_block(folder: Path, tmp_path: Path) -> None:
    """Wherever the term was computed, the last of every two steps; with two passes a step, tempered as the term is."""
    halves = ["train.micro_batch_size=2"]
    run = distill(folder, tmp_path / "run", *halves, "losses.shd.every=2", "losses.shd.temperature=3")
    assert [("shd" in entry["terms"], "shd_by_block" in entry) for entry in log(run)] == [
        (False, False),
        (True, True),
        (False, False),
    ]
    for entry in [*log(folder / "plain"), log(run)[1]]:
        blocks = entry["shd_by_block"]
        assert list(blocks) == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
        assert sum(blocks.values()) / 2 == pytest.approx(entry["terms"]["shd"]["value"], rel=1e-6)
    assert all("shd_by_block" not in entry for entry in log(folder / "teacher"))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_is_warmed_up_by_every_schedule(
    schedule: str, folder: Path, tmp_path: Path
) -> None:
    run = distill(folder, tmp_path / "run", f"train.lr_schedule={schedule}", "train.warmup_steps=4")
    rates = [entry["learning_rate"] for entry in log(run)]
    assert rates == pytest.approx([0, 5e-4, 1e-3])


@pytest.mark.parametrize(
    "error", [ValueError("maps over 36 and 16 tokens"), torch.OutOfMemoryError("memory")]
)
def test_attention_that_cannot_be_shown_does_not_cost_the_run(
    error: Exception, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pipeline is there before the maps are tried, and the same command tries them again."""
    run = tmp_path / "run"

    def apart(*_: object) -> None:
        assert (run / "pipeline" / "model_index.json").exists() and (run / "summary.json").exists()
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "save_attention_maps", apart)
        distill(folder, run, "losses.shd.weight=0")
    assert not (run / "attention.safetensors").exists()
    distill(folder, run, "losses.shd.weight=0")
    assert (run / "attention.safetensors").exists()


@pytest.mark.parametrize("accumulation", ["1", "4"])
def test_the_environment_does_not_override_the_config(
    accumulation: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", accumulation)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    run = distill(folder, tmp_path / "run")
    first, second = weights(run), weights(folder / "plain")
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize(("teacher_channels", "student_channels"), [(2, 1), (1, 2)])
def test_a_learned_variance_is_the_students_own_affair(
    teacher_channels: int, student_channels: int, tmp_path: Path
) -> None:
    """Whether the teacher has one or not, the student's pipeline samples by DDPM as the student predicts."""
    teacher = sets(*SHORT, *TEACHER, f"model.arguments.out_channels={teacher_channels}", "train.max_steps=1")
    assert command("train-teacher", TEACHER_CONFIG, "--output", tmp_path / "teacher", *teacher)[0] == 0
    run = distill(
        tmp_path,
        tmp_path / "run",
        f"student.arguments.out_channels={student_channels}",
        "sample.scheduler=DDPMScheduler",
        "sample.num_images=4",
        "sample.num_inference_steps=3",
    )
    assert set(log(run)[0]["terms"]) == {"denoise", "output", "shd"} | (
        {"variance"} if student_channels == 2 else set()
    )
    kind = json.loads((run / "pipeline" / "scheduler" / "scheduler_config.json").read_text())["variance_type"]
    assert kind == ("learned_range" if student_channels == 2 else "fixed_small")
    assert command("sample", run)[0] == 0


def test_terms_that_masked_passes_do_not_allow_are_refused(tmp_path: Path) -> None:
    """MDTv2's encoder sees the kept tokens, its decoder all: maps of the two do not compare."""
    configs, teacher, run = TEACHER_CONFIG.parent, tmp_path / "teacher", tmp_path / "run"
    more = sets("train.max_steps=1", "train.batch_size=4")
    assert command("train-teacher", configs / "mdtv2-teacher.yaml", "--output", teacher, *more)[0] == 0
    for override, says in (
        ("losses.shd.layer_map=[0, 2, 2, 3]", "16 and 15 tokens"),
        ("losses.aligner.weight=1", "token grids differ"),
    ):
        arguments = sets(override, f"teacher.path={teacher}")
        code, _, errors = command(
            "distill", configs / "mdtv2-distill.yaml", "--output", run, *more, *arguments
        )
        assert code == 2 and "train.mask_ratio" in errors and says in errors, errors
    arguments = sets(
        "losses.features.weight=1", "losses.features.projector=attention", f"teacher.path={teacher}"
    )
    code, _, errors = command("distill", configs / "mdtv2-distill.yaml", "--output", run, *more, *arguments)
    assert code == 2 and "key `losses.features.projector`: `attention` is for all tokens" in errors
    assert not run.exists()


def test_a_pretrained_model_is_not_also_described(folder: Path, tmp_path: Path) -> None:
    arguments = sets(*SHORT, f"teacher.path={folder / 'teacher'}", f"student.pretrained={folder / 'plain'}")
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", tmp_path / "run", *arguments)
    assert code == 2 and "`pretrained` gives class and arguments too" in errors


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["losses.contrastive.weight=1", "train.micro_batch_size=1"], "contrastive` compares 2 images"),
        (
            ["losses.contrastive.weight=1", "losses.contrastive.form=relational", "train.micro_batch_size=3"],
            "contrastive` compares 3 images of a pass or more, and some have 2",  # 4 as 2 and 2
        ),
        (["train.mix=mixup", "train.micro_batch_size=1"], "train.mix` compares 2 images"),
    ],
)
def test_passes_too_small_for_what_compares_their_images_are_refused(
    changes: list[str], says: str, runs: Path, tmp_path: Path
) -> None:
    arguments = sets("train.batch_size=4", f"teacher.path={runs / 'teacher'}", *changes)
    code, _, errors = command("distill", DISTILL_CONFIG, "--output", tmp_path / "run", *arguments)
    assert code == 2 and "train.batch_size" in errors and says in errors, errors
    assert not (tmp_path / "run").exists()
