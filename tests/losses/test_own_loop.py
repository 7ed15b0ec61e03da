"""What goes wrong in a loop of one's own is said with the model or the block."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from small_models import small_dit

from shd_diffusion import AttentionCapture, SHDLoss
from shd_diffusion.attention.records import AttentionRecord


def records(heads: int, batch: int) -> Mapping[str, AttentionRecord]:
    model = small_dit(heads, layers=1).eval()
    with AttentionCapture(model) as capture, torch.no_grad():
        model(torch.zeros(batch, 1, 8, 8), torch.zeros(batch), torch.zeros(batch, dtype=torch.long))
        return capture.records


def test_a_model_that_was_not_run_is_named() -> None:
    ran = records(2, 1)
    for given, whose in ((({}, ran), "teacher"), ((ran, {}), "student")):
        with pytest.raises(
            ValueError, match=f"no records of the {whose}: run it inside its AttentionCapture"
        ):
            SHDLoss()(*given)


def test_other_samples_are_told_with_the_block() -> None:
    message = r"block transformer_blocks\.0\.attn1: the teacher saw 2 samples .*, the student 1; run both on the same"
    with pytest.raises(ValueError, match=message):
        SHDLoss()(records(4, 2), records(2, 1))
