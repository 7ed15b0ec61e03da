"""Costs counted on tensors without content, against real ones and against sizes worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import DISTILL_CONFIG, TEACHER_CONFIG
from families_with_conditions import TAUGHT
from small_models import small_dit

from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.losses import TERMS
from shd_diffusion.models.factory import cast
from shd_diffusion.models.quantised import QuantisedLinear
from shd_diffusion.training.build import Parts
from shd_diffusion.training.count import count_passes, made_up_batch, materialised, meter_passes, twin
from shd_diffusion.training.dry_run import build_empty
from shd_diffusion.training.launch import make_accelerator
from shd_diffusion.training.memory import memory


def digits(*overrides: str) -> Parts:
    """Two blocks of 4 heads taught into two of 2, on made-up digits, by every term."""
    arguments = [
        f"teacher.path={TEACHER_CONFIG}",
        "student.arguments.num_layers=2",
        "student.arguments.num_attention_heads=2",
        "train.batch_size=2",
        *overrides,
    ]
    return build_empty(read_config(DISTILL_CONFIG, DistillConfig, arguments), "config")


@pytest.mark.parametrize(
    ("precision", "losses"),
    [("no", [f"losses.{name}.weight=1" for name in TERMS]), ("bf16", ["losses.shd.rows=0.5"])],
)
def test_without_content_the_counts_are_the_same(precision: str, losses: list[str]) -> None:
    parts = digits(f"train.mixed_precision={precision}", *losses)
    accelerator = make_accelerator(parts.config.train, Path())
    device = torch.device("cpu")
    found = meter_passes(materialised(parts, device), made_up_batch(parts, 2, device), accelerator)
    assert count_passes(parts, 2, accelerator) == found
    assert all(len(count.forward) == 2 and count.activations > 0 for count in found.values())
    assert all(count.operations > 3 * count.forward[0] + count.forward[1] for count in found.values())


def test_terms_of_some_steps_count_as_often_as_they_do_and_need_all_their_memory() -> None:
    """Of 600 steps half have SHD, or every third; none of them is the first."""
    accelerator = make_accelerator(digits().config.train, Path())

    def counted(*losses: str) -> tuple[int, int]:
        found = count_passes(digits(*losses), 2, accelerator)[False]
        return found.operations, found.activations

    (with_shd, most), (without, less) = counted(), counted("losses.shd.weight=0")
    for losses, share in (("losses.shd.during=[0.5, 1]", 1 / 2), ("losses.shd.every=3", 1 / 3)):
        operations, activations = counted(losses)
        assert operations == pytest.approx(without + share * (with_shd - without), abs=1)
        assert activations == most > less


def test_a_student_of_8_bits_is_measured_as_one() -> None:
    parts = materialised(digits("student.quantise=int8"), torch.device("cpu"))
    kinds = {type(module) for module in parts.model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {QuantisedLinear}


def test_a_teacher_on_the_cpu_takes_none_of_the_accelerator() -> None:
    assert memory(digits("teacher.device=cpu"), 0, 0)["teacher"] == 0


def test_checkpointing_computes_the_student_again_and_keeps_less() -> None:
    parts = digits("losses.shd.weight=0", "losses.output.weight=0", "student.arguments.num_layers=6")
    accelerator = make_accelerator(parts.config.train, Path())
    plain, again = count_passes(parts, 2, accelerator).values()
    block = parts.model.transformer_blocks[0]
    linear = sum(p.numel() for n, p in block.named_parameters() if n.endswith("weight") and "norm" not in n)
    tokens = 2 * parts.student_trace.records["transformer_blocks.0.attn1"].query.shape[2]
    assert (
        again.operations - plain.operations > 2 * 2 * tokens * linear
    )  # the products of two blocks at least
    assert again.activations < 0.6 * plain.activations


def test_memory_of_a_process_by_hand() -> None:
    parts = digits()
    weights = 4 * sum(p.numel() for p in parts.model.parameters())
    teacher = 4 * sum(p.numel() for p in parts.teacher.model.parameters())
    alone = memory(parts, activations=1000, extra_parameters=10)
    assert alone == {
        "teacher": teacher,
        "weights": weights,
        "gradients": weights,
        "optimiser": 2 * weights,
        "average": weights,
        "extra_parameters": 160,
        "whole_blocks": 0,
        "activations": 1000,
        "sum": teacher + 5 * weights + 160 + 1000,
    }
    sharded = memory(parts, 1000, 10, processes=4)
    assert sharded["weights"] == weights // 4 and sharded["teacher"] == teacher // 4
    # of two blocks one is the first and one the next: all of the student is whole at some time, gradients too
    blocks = [4 * sum(p.numel() for p in b.parameters()) for b in parts.teacher.model.transformer_blocks]
    assert sharded["whole_blocks"] == 2 * weights + teacher - sum(sorted(blocks[1:])[:-2])


@pytest.mark.parametrize("name", ["DiT", "Wan"])
def test_a_twin_has_the_precision_and_the_frozen_parameters_of_its_model(name: str) -> None:
    model = small_dit(2) if name == "DiT" else TAUGHT[name].build(2)
    first = next(iter(dict(model.named_parameters())))
    model.get_parameter(first).requires_grad_(False)
    other = twin(cast(model, torch.bfloat16), torch.device("meta"))
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in other.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
    }
    kept = {n for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert bool(kept) == (name == "Wan") and torch.bfloat16 in {p.dtype for p in model.parameters()}
