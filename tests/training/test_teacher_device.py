"""A teacher on the CPU beside a student elsewhere: tensors without content, which still refuse to mix devices."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from commands import DISTILL_CONFIG
from small_models import small_dit
from torch._subclasses.fake_tensor import FakeTensorMode

from shd_diffusion.config import DiffusionConfig, DistillConfig, read_config
from shd_diffusion.losses import SHDLoss
from shd_diffusion.losses.denoising import forward_process
from shd_diffusion.models.adapter import freeze, predict
from shd_diffusion.training import stages
from shd_diffusion.training.methods import Batch
from shd_diffusion.training.stages import distillation


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("pairing", ["adjacent", "matched"])
def test_a_teacher_on_the_cpu_teaches_a_student_on_another_device(pairing: str) -> None:
    config = DistillConfig.model_validate(
        {
            "output": "run",
            "data": {"name": "digits"},
            "teacher": {"path": "teacher", "device": "cpu"},
            "student": {"class": "DiTTransformer2DModel", "arguments": {}},
            "losses": {"attention_mse": {"weight": 1.0}},
            "train": {"max_steps": 1, "batch_size": 4},
        }
    )
    process = forward_process(DiffusionConfig())
    # the finiteness checks read numbers, of which there are none
    with FakeTensorMode(allow_non_fake_inputs=True), patch("torch.compiler.is_compiling", lambda: True):
        teacher = freeze(small_dit(4))
        with torch.device("cuda"):
            student, images = small_dit(2), torch.randn(4, 1, 8, 8)
            numbers = torch.zeros(4, dtype=torch.long)
        batch = Batch(
            clean=images, noise=images, noised=images, timesteps=numbers, times=numbers, labels=numbers
        )
        shd = SHDLoss(pairing=pairing)  # type: ignore[arg-type]
        if pairing == "matched":
            shd.plans = {f"transformer_blocks.{i}.attn1": (((0, 2), (1, 3)),) for i in range(2)}
        with distillation(config, teacher, student, process, shd) as method:
            terms = method(student, batch, step=0)
            records = [captured.records for captured in method.captures.read()]
            found = shd.explain(*records)
    assert teacher.device.type == "cpu"
    assert {name: term.device.type for name, term in terms.items()} == dict.fromkeys(
        ("denoise", "output", "shd", "attention_mse"), "cuda"
    )
    assert {explanation.residual.device.type for explanation in found.values()} == {"cuda"}


def test_a_run_is_set_up_on_the_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("meta")
    accelerator = SimpleNamespace(device=device, is_main_process=True, wait_for_everyone=lambda: None)
    monkeypatch.setattr(stages, "make_accelerator", lambda *_: accelerator)
    monkeypatch.setattr(stages, "start_trackers", lambda *_: None)
    config = read_config(DISTILL_CONFIG, DistillConfig, ["losses.features.weight=1"])
    teacher, shd = freeze(small_dit(12, layers=6)), SHDLoss()
    stage = stages._open(config, config.student, "student", tmp_path / "run", "distill.yaml", teacher)
    assert stage is not None and {each.device for each in stage.model.parameters()} == {device}
    with stages.distillation(config, teacher, stage.model, stage.process, shd) as method:
        assert {each.device for each in method.parameters()} == {device}
        predict(teacher, torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
        taught, _ = method.captures.read()
        assert {record.query.device for record in taught.records.values()} == {device}
