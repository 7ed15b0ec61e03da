"""A teacher on the CPU beside a student elsewhere: tensors without content, which still refuse to mix devices."""

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from commands import DISTILL_CONFIG
from small_models import small_dit
from torch._subclasses.fake_tensor import FakeTensorMode

from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.losses import LossesConfig, build_terms
from shd_diffusion.losses.term import Batch
from shd_diffusion.models.denoiser import freeze
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.models.trace import trace
from shd_diffusion.squeezing.plan import BlockPlan
from shd_diffusion.training import build, run
from shd_diffusion.training.objectives import TrainingLoss

LABEL = {"class_labels": torch.tensor([0])}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("pairing", ["adjacent", "matched"])
def test_a_teacher_on_the_cpu_teaches_a_student_on_another_device(pairing: str) -> None:
    process = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))
    losses = LossesConfig.model_validate({"shd": {"pairing": pairing}, "attention_mse": {"weight": 1.0}})
    traces = [trace(small_dit(heads), (1, 8, 8), LABEL) for heads in (2, 4)]
    terms = build_terms(losses, *traces, seed=0)
    # the finiteness checks read numbers, of which there are none
    with FakeTensorMode(allow_non_fake_inputs=True), patch("torch.compiler.is_compiling", lambda: True):
        teacher = freeze(small_dit(4))
        with torch.device("cuda"):
            student, images = small_dit(2), torch.randn(4, 1, 8, 8)
            numbers = torch.zeros(4, dtype=torch.long)
        batch = Batch(images, images, images, numbers, {"class_labels": numbers})
        with TrainingLoss(process, terms, student, teacher, 1) as loss:
            assert loss.shd is not None
            if pairing == "matched":
                loss.shd.loss.plans = dict.fromkeys(loss.shd.pairs, BlockPlan((((0, 2), (1, 3)),)))
            found = loss(student, batch, step=0)
    assert teacher.device.type == "cpu"
    assert {name: term.device.type for name, term in found.items()} == dict.fromkeys(
        ("denoise", "output", "shd", "attention_mse"), "cuda"
    )


def test_a_run_is_set_up_on_the_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("meta")
    accelerator = SimpleNamespace(device=device, is_main_process=True, wait_for_everyone=lambda: None)
    monkeypatch.setattr(run, "make_accelerator", lambda *_: accelerator)
    monkeypatch.setattr(build, "load_teacher", lambda _: Teacher(freeze(small_dit(12, layers=6))))
    config = read_config(DISTILL_CONFIG, DistillConfig, ["losses.features.weight=1"])
    opened = run.open_run(config, run.RunFolder(tmp_path / "run"), "distill.yaml")
    run.place_models(opened.parts, opened.accelerator)
    teacher = opened.parts.teacher
    assert teacher is not None
    for model in (opened.parts.model, teacher.model):
        assert {parameter.device for parameter in model.parameters()} == {device}
    assert not (tmp_path / "run").exists()
