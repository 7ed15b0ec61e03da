"""What a model's output loses by fewer heads, neurons or blocks, all on one scale (docs/method.md section 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from diffusers import ModelMixin

from shd_diffusion.attention import attention_blocks
from shd_diffusion.compression.attention import (
    HeadOptions,
    check_can_be_squeezed,
    head_counts,
    head_losses,
    squeeze_attention,
)
from shd_diffusion.compression.depth import block_importances
from shd_diffusion.compression.feed_forward import neuron_losses, squeeze_feed_forward
from shd_diffusion.compression.walk import (
    CalibrationBatch,
    Predict,
    copy_sharing,
    passes,
    relative_change,
    walk_beside,
)
from shd_diffusion.models.layouts import feed_forwards

STEPS = 16  # a part may keep as many sixteenths of what it has
OUTPUT_BATCHES = 4  # on so many the change of the output is measured


@dataclass(frozen=True, slots=True)
class Importance:
    """What is lost, as |change|² / |output|² of the model.

    Attributes:
        parts: by path of each attention block and feed-forward layer, of each number of heads or neurons.
        blocks: of each block, when it leaves.
    """

    parts: dict[str, dict[int, float]]
    blocks: dict[str, float]


def possible_counts(model: ModelMixin, options: HeadOptions) -> dict[str, list[int]]:
    """Fewer heads or neurons that each part can have, in about sixteen steps, by module path."""
    possible: dict[str, Sequence[int]] = {}
    for name, block in attention_blocks(model).items():
        try:
            check_can_be_squeezed(model, name, options)
            possible[name] = head_counts(model, name) if block.capturable else ()
        except ValueError:
            continue
    possible |= {name: range(1, layer.neurons + 1) for name, layer in feed_forwards(model).items()}
    steps = {name: _in_steps(counts) for name, counts in possible.items() if counts}
    return {name: counts for name, counts in steps.items() if counts}


def _in_steps(counts: Sequence[int]) -> list[int]:
    """Of some counts those closest to each sixteenth of the largest, without that one; descending."""
    most = max(counts)
    closest = {min(counts, key=lambda c: abs(c - most * step / STEPS)) for step in range(1, STEPS)}
    return sorted(closest - {most}, reverse=True)


@torch.no_grad()
def measure_importance(
    teacher: ModelMixin,
    batches: Sequence[CalibrationBatch],
    predict: Predict,
    counts: Mapping[str, Sequence[int]],
    blocks: Sequence[str],
    options: HeadOptions,
    report: Callable[[str], object] = lambda message: None,
) -> Importance:
    """What each part loses by each count, without making a model of each.

    The loss of a part's own output is known for all counts from its moments. What the model's output loses by it is
    measured once a part, at a count close to half, and taken to be in proportion: both are squares of an error that
    hardly turns as it grows. The time is that of three forward passes a block, beside what the moments take.

    Args:
        teacher: a diffusers model; it is put in evaluation mode and otherwise left as it is.
        batches: see `compress`.
        predict: see `compress`.
        counts: of parts by module path, see `possible_counts`; one that runs with no batch is not in the result.
        blocks: module paths, see `removable_blocks`.
        options: how heads are merged.
        report: is told what has been measured.

    Raises:
        ValueError: one of the blocks cannot leave.
    """
    teacher.eval()
    some = batches[:OUTPUT_BATCHES]
    outputs = [run() for run in passes(teacher, some, predict)]
    walker, layers = copy_sharing(teacher), feed_forwards(teacher)
    walk = walk_beside(
        teacher,
        walker,
        {name: name for name in counts},
        passes(teacher, batches, predict),
        passes(walker, batches, predict),
    )
    found: dict[str, dict[int, float]] = {}
    with closing(walk):
        for name, calls, targets in walk:
            changed = copy_sharing(teacher, name.rpartition(".")[0])
            own = [replace(call) for call in calls]
            if name in layers:
                (target,) = targets.values()
                losses = neuron_losses(walker, name, counts[name], calls, target)
                squeeze_feed_forward(changed, name, tried := _to_try(losses), own, target)
            else:
                losses = head_losses(walker, name, counts[name], calls, targets, options)
                squeeze_attention(changed, name, tried := _to_try(losses), own, targets, options)
            change = relative_change((run() for run in passes(changed, some, predict)), outputs)
            scale = change / max(losses[tried], torch.finfo(torch.float64).tiny)
            found[name] = {count: scale * loss for count, loss in losses.items()}
            report(f"{name}: with {tried} left, the output changes by {change:.3g}")
    return Importance(found, block_importances(teacher, some, predict, blocks))


def _to_try(losses: Mapping[int, float]) -> int:
    """The count closest to half, of those that lose anything to speak of: a hundredth of what the smallest loses."""
    worth = [count for count, loss in losses.items() if loss >= 0.01 * max(losses.values())]
    return min(worth, key=lambda count: abs(count - (max(losses) + 1) / 2))
