"""What a run begins with, how it ends, and what the machine refuses it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DISTILL_CONFIG, TEACHER_CONFIG, command, sets, start
from forks import Fork
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from shd_diffusion.errors import OUT_OF_MEMORY
from shd_diffusion.models import hub
from shd_diffusion.processes import tell_launch
from shd_diffusion.training.loop import take_step
from shd_diffusion.training.train_state import TrainState

SHORT = ["train.batch_size=4", "train.log_every=1", "train.checkpoint_every=1", "train.lr_schedule=constant"]
TINY = ["num_layers=1", "num_attention_heads=2"]
TEACHER = ["train-teacher", TEACHER_CONFIG, *sets(*SHORT, *(f"model.arguments.{part}" for part in TINY))]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trust") / "teacher"
    assert command(*TEACHER, "--output", run, *sets("train.max_steps=1"))[0] == 0
    return run


def one_error(code: int, errors: str, wanted: int = 2) -> str:
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert code == wanted and len(lines) == 1 and "Traceback" not in errors, errors
    return lines[0]


# --- what a run begins with --------------------------------------------------------------------------------------


def test_a_run_does_not_go_on_in_another_process_of_its_teacher(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "teacher")
    arguments = ["distill", DISTILL_CONFIG, "--output", tmp_path / "run"]
    arguments += sets(
        *SHORT, f"teacher.path={tmp_path / 'teacher'}", *(f"student.arguments.{part}" for part in TINY)
    )
    assert command(*arguments, *sets("train.max_steps=1"))[0] == 0
    file = tmp_path / "teacher" / "pipeline" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.03}))
    code, _, errors = command(*arguments, *sets("train.max_steps=2"))
    assert "what `diffusion` names has changed" in one_error(code, errors)


def test_every_session_of_a_run_is_told(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "run")
    first = json.loads((teacher / "environment.json").read_text())
    assert "resumed" not in first
    for steps in (2, 2, 3):  # the second time there is nothing to do
        assert command(*TEACHER, "--output", tmp_path / "run", *sets(f"train.max_steps={steps}"))[0] == 0
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    resumed = environment.pop("resumed")
    assert environment == first and len(resumed) == 2
    assert all(each.keys() == first.keys() and each["started"] >= first["started"] for each in resumed)


def test_a_run_does_not_go_on_from_other_pretrained_weights(teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher / "pipeline", tmp_path / "start")
    arguments = ["distill", DISTILL_CONFIG, "--output", tmp_path / "run"]
    config = tmp_path / "distill.yaml"
    text = DISTILL_CONFIG.read_text()
    begin, end = text.index("student:"), text.index("losses:")
    config.write_text(f"{text[:begin]}student: {{pretrained: {tmp_path / 'start'}}}\n{text[end:]}")
    arguments = ["distill", config, "--output", tmp_path / "run", *sets(*SHORT, f"teacher.path={teacher}")]
    assert command(*arguments, *sets("train.max_steps=1"))[0] == 0
    file = tmp_path / "start" / "denoiser" / "diffusion_pytorch_model.safetensors"
    changed = load_file(file)
    next(iter(changed.values())).mul_(1.01)
    save_file(changed, file, metadata={"format": "pt"})
    code, _, errors = command(*arguments, *sets("train.max_steps=2"))
    assert f"what `student.pretrained` names ({tmp_path / 'start'}) has changed" in one_error(code, errors)


# --- how it ends -------------------------------------------------------------------------------------------------


def test_no_checkpoint_has_weights_that_are_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of finite gradients may make them so."""

    def overflow(state: TrainState, *rest: Any) -> Any:
        found = take_step(state, *rest)
        state.parameters[0].data.fill_(torch.inf)
        return found

    monkeypatch.setattr("shd_diffusion.training.loop.take_step", overflow)
    code, _, errors = command(*TEACHER, "--output", tmp_path / "run", *sets("train.max_steps=3"))
    assert "weights that are not finite" in one_error(code, errors, 3)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "pipeline").exists()


def test_a_signal_to_one_process_ends_all_of_them_with_a_checkpoint(tmp_path: Path) -> None:
    from torch.distributed import TCPStore

    run = tmp_path / "run"
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    known: dict[str, Any] = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    known |= {
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "CUDA_VISIBLE_DEVICES": "",
    }
    steps = sets("train.max_steps=100000", "train.checkpoint_every=100000")
    ranks = [
        Fork("shd_diffusion.cli:main", *TEACHER, "--output", run, *steps, RANK=rank, LOCAL_RANK=rank, **known)
        for rank in ("0", "1")
    ]
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [128 + signal.SIGTERM] * 2, said
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last:08d}"]


# --- what the machine refuses ------------------------------------------------------------------------------------


def test_a_full_disk_while_sampling_is_one_line_and_the_same_command_goes_on(
    teacher: Path, tmp_path: Path
) -> None:
    """The size that a file may have stands in for the space that is left."""
    few = sets("sample.num_images=64", "sample.num_inference_steps=1")
    arguments = ["sample", teacher, "--npz", "--output", tmp_path / "samples", *few]
    process = start(*arguments)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8_000, 8_000))
    _, errors = process.communicate(timeout=120)
    assert "samples.npz: File too large; make room" in one_error(process.returncode, errors)
    assert not (tmp_path / "samples" / "samples.npz").exists()
    assert command(*arguments)[0] == 0


def test_what_to_lower_is_said_where_memory_is_short(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("9 GB")

    monkeypatch.setattr("shd_diffusion.sampling.sample_run.sample_run", fail)
    code, _, errors = command("sample", teacher)
    assert (
        one_error(code, errors, OUT_OF_MEMORY)
        == "error: out of memory (9 GB); lower sample.pass_size, sample.dtype"
    )


def test_a_fault_of_the_project_keeps_its_traceback_and_says_so(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("shd_diffusion.sampling.sample_run.sample_run", fail)
    with pytest.raises(KeyError) as caught:
        command("sample", teacher)
    assert "please report it" in caught.value.__notes__[0]


def test_a_hub_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    hub.go_offline_without_hub.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(hub, "PATIENCE", 0.1)
        assert hub.try_hub("nobody/nothing")
        assert (
            constants.HF_HUB_OFFLINE and f"{address}: does not answer (timed out)" in capsys.readouterr().err
        )
        code, _, errors = command("inspect", "nobody/nothing")
        assert "nobody/nothing" in one_error(code, errors)
    hub.go_offline_without_hub.cache_clear()


def test_a_local_path_is_never_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(hub, "go_offline_without_hub", ask)
    monkeypatch.setattr("urllib.request.urlopen", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/x", "./x", "../x", "x", "a/b/c", "/a/b", str(tmp_path / "x"), "x y/z"):
        assert not hub.try_hub(name)
    assert hub.is_hub_name("owner/name")  # a question to nobody
    with pytest.raises(AssertionError, match="asked"):
        hub.try_hub("owner/name")


@pytest.mark.parametrize(
    ("count", "device", "environment", "told"),
    [
        (1, "cpu", {}, ""),
        (
            1,
            "cpu",
            {"ACCELERATE_MIXED_PRECISION": "no"},
            "1 process (cpu): `accelerate launch --cpu` starts one",
        ),
        (1, "cuda", {"ACCELERATE_MIXED_PRECISION": "no"}, "1 process (cuda)\n"),
        (2, "cuda", {}, "2 processes (cuda)\n"),
    ],
)
def test_it_is_told_how_many_processes_a_launcher_has_started(
    count: int,
    device: str,
    environment: dict[str, str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tell_launch.cache_clear()
    tell_launch(count, device)
    tell_launch(count, device)
    said = capsys.readouterr().err
    assert said.startswith(told) and said.count("process (") + said.count("processes (") == bool(told)


def test_a_launcher_that_is_none_is_one_line(tmp_path: Path) -> None:
    process = Fork("shd_diffusion.cli:main", *TEACHER, "--output", tmp_path / "run", WORLD_SIZE="many")
    _, errors = process.communicate(timeout=120)
    assert "WORLD_SIZE" in one_error(process.returncode, errors)
    assert not (tmp_path / "run").exists()
