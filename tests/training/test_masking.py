"""Masked training: which terms there are, what both models are shown, and runs through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, command, sets
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from torch import Tensor

from shd_diffusion.config import TrainTeacherConfig, read_config
from shd_diffusion.data import build_source
from shd_diffusion.losses.term import Batch, StepOutputs, Term, TermConfig
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.mdtv2 import MDTv2Transformer2DModel
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.training.build import build
from shd_diffusion.training.checks import check_masking
from shd_diffusion.training.objectives import TrainingLoss

CONFIGS = ROOT / "configs" / "digits"
SHORT = ["train.max_steps=2", "train.batch_size=8", "train.log_every=1", "train.checkpoint_every=2"]
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "sample_size": 8,
    "patch_size": 2,
}


def mdtv2(**arguments: Any) -> MDTv2Transformer2DModel:
    sizes = SIZES | {"num_layers": 2, "num_decoder_layers": 0, "num_embeds_ada_norm": 10}
    return MDTv2Transformer2DModel(**sizes | arguments)


class Seen(Term):
    """A term that notes the masks it is called with."""

    needs_teacher = False
    reaches_output = True

    def __init__(self) -> None:
        super().__init__(TermConfig(weight=0.5), None, None)  # type: ignore[arg-type]
        self.seen: list[Tensor | None] = []

    def forward(self, outputs: StepOutputs) -> Tensor:
        self.seen.append(outputs.batch.condition.get("ids_keep"))
        return torch.tensor(float(len(self.seen)))


def test_every_batch_is_seen_whole_and_masked_with_the_same_weight() -> None:
    term, kept, model = Seen(), torch.tensor([[0, 3], [2, 1]]), mdtv2().eval()
    process = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))
    part, numbers = torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
    batch = Batch(part, part, part, numbers, {"class_labels": numbers}, {"ids_keep": kept})
    with TrainingLoss(process, {"seen": term}, model, None, 10) as loss:
        terms = loss(model, batch, 3)
    assert {name: float(term) for name, term in terms.items()} == {"seen": 1.0, "seen_masked": 2.0}
    assert term.seen[0] is None and term.seen[1] is kept
    assert loss.weights(3) == {"seen": 0.5, "seen_masked": 0.5}


def test_without_masking_what_only_it_trains_is_frozen(tmp_path: Path) -> None:
    for ratio, frozen in ((0.0, {"mask_token", "side_block"}), (0.3, set())):
        overrides = ["model.arguments.num_layers=4", *SHORT, f"train.mask_ratio={ratio}"]
        config = read_config(CONFIGS / "mdtv2-teacher.yaml", TrainTeacherConfig, overrides)
        model = build(config, "here", build_source(config.data)).model
        names = {name.partition(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
        assert names == frozen


def test_models_that_cannot_share_a_mask_are_named() -> None:
    dit = DiTTransformer2DModel(num_layers=1, out_channels=1, num_embeds_ada_norm=10, **SIZES)
    with pytest.raises(ValueError, match="DiTTransformer2DModel takes no token mask"):
        check_masking(mdtv2(), Teacher(dit), 0.3)
    with pytest.raises(ValueError, match="16 tokens of the student and 4 of the teacher"):
        check_masking(mdtv2(), Teacher(mdtv2(patch_size=4)), 0.3)
    with pytest.raises(ValueError, match=r"mask_ratio 0\.79"):
        check_masking(mdtv2(patch_size=4), None, 0.79)


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MDTv2 of ten blocks, eight of them in its encoder."""
    run = tmp_path_factory.mktemp("deep") / "teacher"
    deep = ["model.arguments.num_layers=10", "model.arguments.num_attention_heads=4", *SHORT]
    code, _, errors = command("train-teacher", CONFIGS / "mdtv2-teacher.yaml", "--output", run, *sets(*deep))
    assert code == 0, errors
    return run


@pytest.mark.parametrize("layer_map", ["uniform", "[3, 7, 8, 9]"])
def test_a_deeper_mdtv2_teaches_a_shallower_one_masked(
    deep_teacher: Path, tmp_path: Path, layer_map: str
) -> None:
    """Encoders of 8 and 2 blocks, as XL and S differ: in every stage the student learns from the same stage."""
    pairing = [
        "losses.shd.pairing=matched",
        "losses.shd.calibration_batches=1",
        "student.arguments.num_attention_heads=3",
    ]
    code, _, errors = command(
        "distill", CONFIGS / "mdtv2-distill.yaml", "--output", tmp_path / "student",
        *sets(*SHORT, *pairing, f"losses.shd.layer_map={layer_map}", f"teacher.path={deep_teacher}"),
    )  # fmt: skip
    assert code == 0, errors
    entry = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[-1])
    assert set(entry["terms"]) == {
        name + suffix for name in ("denoise", "output", "shd") for suffix in ("", "_masked")
    }
    assert entry["terms"]["shd"]["value"] != entry["terms"]["shd_masked"]["value"]
    divergence = entry["shd_by_block"]  # of the passes over all tokens
    assert sum(divergence.values()) / len(divergence) == pytest.approx(entry["terms"]["shd"]["value"])
    with safe_open(tmp_path / "student" / "attention.safetensors", "pt") as file:
        blocks = json.loads(file.metadata()["description"])["blocks"]
    assert [block["teacher"] for block in blocks] == [
        "in_blocks.3.attn", "out_blocks.3.attn", "decoder_blocks.0.attn", "decoder_blocks.1.attn"
    ]  # fmt: skip
    plans = json.loads((tmp_path / "student" / "merge_plans.json").read_text())
    assert set(plans) == {
        "in_blocks.0.attn", "out_blocks.0.attn", "decoder_blocks.0.attn", "decoder_blocks.1.attn"
    }  # fmt: skip


def test_masking_a_dit_is_refused(tmp_path: Path) -> None:
    options = sets(*SHORT, "train.mask_ratio=0.3")
    code, _, errors = command(
        "train-teacher", CONFIGS / "teacher.yaml", "--output", tmp_path / "run", *options
    )
    assert code == 2 and "train.mask_ratio" in errors and "takes no token mask" in errors
    assert not (tmp_path / "run").exists()
