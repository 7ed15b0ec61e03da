"""The loss on a few fixed samples while a model trains: what `train.validation.loss_images` asks for.

Items, captions, noise and timesteps are the same at every step and in every run of a seed; no condition is dropped and
nothing is flipped. So the numbers of two steps, and of two runs, differ by the models alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.data import Source
from shd_diffusion.losses.term import Batch
from shd_diffusion.models.denoiser import Condition
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.training.batches import NoiseSettings, draw_noise, make_batch
from shd_diffusion.training.diagnostics import GOLDEN_RATIO
from shd_diffusion.training.loop import Validation
from shd_diffusion.training.objectives import TrainingLoss


def spread(count: int, groups: Sequence[range], size: int) -> list[list[int]]:
    """`count` items evenly over the data, or all if there are fewer, in passes of at most `size` of one group each.

    The passes of a group are of about one size: some terms compare the samples of a pass.
    """
    length = sum(map(len, groups))
    count = min(count, length)
    chosen = [place * length // count for place in range(count)]
    of_groups = [[item for item in chosen if item in group] for group in groups]
    return [part for own in of_groups for part in _evenly(own, -(-len(own) // size))]


def _evenly(items: list[int], parts: int) -> list[list[int]]:
    ends = [len(items) * part // parts for part in range(1, parts + 1)]
    return [items[start:end] for start, end in pairwise([0, *ends])]


def deal(passes: Sequence[list[int]], process: int, processes: int) -> list[tuple[int, bool]]:
    """The passes of one process by number, and whether each counts.

    All processes take equally many, since sharded models meet in each; what is over does not count.
    """
    turns = -(-len(passes) // processes)
    mine = [turn * processes + process for turn in range(turns)]
    return [(number % len(passes), number < len(passes)) for number in mine]


def fixed_batches(
    source: Source,
    process: ForwardProcess,
    settings: NoiseSettings,
    seed: int,
    device: torch.device,
    passes: Sequence[list[int]],
    numbers: Iterable[int],
    null: Condition,
) -> Iterator[Batch]:
    """The batches of some of the passes.

    The noise of a sample follows from the seed and its place among all; its timestep lies where the multiples of the
    golden ratio put it in the schedule, which any number of samples covers evenly.
    """
    firsts = [sum(map(len, passes[:number])) for number in range(len(passes))]
    numbers = list(numbers)
    for number, items in zip(numbers, source.batches([passes[n] for n in numbers]), strict=True):
        places = range(firsts[number], firsts[number] + len(passes[number]))
        of_these = replace(settings, shape=source.shape_of(items), condition_dropout=0.0)
        noise = draw_noise(seed, "validation", places, of_these)
        shares = torch.tensor([(0.5 + GOLDEN_RATIO * place) % 1 for place in places], dtype=torch.float64)
        noise = replace(noise, shares=shares, flipped=torch.zeros_like(noise.flipped))
        yield make_batch(source, process, items, noise, null, device)


def sum_terms(parts: Iterable[tuple[Mapping[str, Tensor], int]]) -> dict[str, Tensor]:
    """Terms that are means over so many samples each, summed over all of them."""
    sums: dict[str, Tensor] = {}
    for terms, count in parts:
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term * count
    return sums


def make_validation_loss(
    loss: TrainingLoss,
    source: Source,
    settings: NoiseSettings,
    seed: int,
    count: int,
    size: int,
    accelerator: Accelerator,
    null: Condition,
) -> Validation:
    """Every term of the loss of a model in evaluation mode, on fixed samples that the processes share.

    The teacher's own `denoise` on them is told too, which the student's is to be compared with; a frozen one's is found
    once. Terms and their weights are those of the first step at which most terms count, whatever decays. All is in
    float32, as in sampling.

    Args:
        loss: of the run; open when the validation is called.
        settings: of the run's noise; shape and dropout are not taken from it.
        count: of items.
        size: items that go through the models at once.
        null: what stands for no condition, which a guided teacher sees beside the sample's own.
    """
    passes = spread(count, source.groups, size)
    total = sum(map(len, passes))
    dealt = deal(passes, accelerator.process_index, accelerator.num_processes)

    @torch.no_grad()
    def means(terms_of: Callable[[Batch], Mapping[str, Tensor]]) -> dict[str, float]:
        numbers = [number for number, _ in dealt]
        batches = fixed_batches(
            source, loss.process, settings, seed, accelerator.device, passes, numbers, null
        )
        sums = sum_terms(
            (terms_of(batch), len(batch.clean) * counts)
            for batch, (_, counts) in zip(batches, dealt, strict=True)
        )
        if not sums:
            return {}
        mean = accelerator.reduce(torch.stack([*sums.values()]), "sum") / total
        return dict(zip(sums, mean.tolist(), strict=True))

    @cache
    def of_teacher() -> dict[str, float]:
        return means(loss.of_teacher)

    def validate(model: ModelMixin) -> tuple[dict[str, object], None]:
        terms, weights = means(partial(loss.plain, model)), loss.weights(loss.fullest_step)
        total_loss = sum(weights[name] * value for name, value in terms.items())
        if loss.teacher_rate is not None:
            of_teacher.cache_clear()  # it has trained meanwhile
        teacher = {"teacher": of_teacher()} if of_teacher() else {}
        return {"loss": total_loss, "terms": terms, **teacher}, None

    return validate
