"""A term on made-up records or features, without any model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shd_diffusion.attention import AttentionRecord
from shd_diffusion.losses import TERMS, Term
from shd_diffusion.losses.term import Batch, Captured, StepOutputs
from shd_diffusion.models.forward_process import DiffusionConfig, ForwardProcess, make_scheduler_of_process
from shd_diffusion.models.trace import Trace

PROCESS = ForwardProcess.from_scheduler(make_scheduler_of_process(DiffusionConfig()))


def batch(samples: int = 2, shape: tuple[int, int] = (4, 4)) -> Batch:
    torch.manual_seed(2)
    clean, noise = torch.randn(2, samples, 1, *shape, dtype=torch.float64)
    timesteps = torch.tensor([0, 250, 700, 999, 3])[:samples]
    return Batch(clean, noise, PROCESS.noised(clean, noise, timesteps), timesteps, {})


def on_records(
    name: str,
    teacher: Mapping[str, AttentionRecord],
    student: Mapping[str, AttentionRecord],
    shape: tuple[int, int] = (4, 4),
    **options: Any,
) -> tuple[Term, StepOutputs]:
    """The term in float64, and the outputs of a step that captured these records."""

    def trace(records: Mapping[str, AttentionRecord]) -> Trace:
        return Trace((1, *shape), records, torch.zeros(1, 1, *shape))

    term = _built(name, trace(student), trace(teacher), options)
    of = batch(len(next(iter(student.values())).query), shape)
    return term, StepOutputs(PROCESS, of, of.noised, of.noised, Captured(student), Captured(teacher))


def on_features(
    name: str,
    teacher: Tensor,
    student: Tensor,
    shape: tuple[int, int] = (4, 4),
    step: int = 0,
    **options: Any,
) -> tuple[Term, StepOutputs]:
    """The term on the features (B, N, C) of one block of each model."""
    block, attention = "blocks.0", "blocks.0.attn"

    def trace(features: Tensor) -> Trace:
        tokens = features.shape[1]
        empty = torch.empty(1, 1, tokens, 2)
        record = AttentionRecord(
            attention, "self", empty, empty, empty, torch.empty(features.shape[2], 2), 1.0
        )
        return Trace((1, *shape), {attention: record}, torch.zeros(1, 1, *shape), {block: features[:1]})

    term = _built(name, trace(student), trace(teacher), options)
    of = batch(len(student), shape)
    both = Captured(outputs={block: student}), Captured(outputs={block: teacher})
    return term, StepOutputs(PROCESS, of, of.noised, of.noised, *both, step)


def _built(name: str, student: Trace, teacher: Trace, options: Mapping[str, Any]) -> Term:
    torch.manual_seed(0)
    config = TERMS[name].Config.model_validate({"weight": 1.0, **options})
    return TERMS[name](config, student, teacher).double()
