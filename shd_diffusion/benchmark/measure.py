"""Candidates counted one by one, then timed in turns: what each costs, and the first as a measure of the others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import ModelMixin

from shd_diffusion.benchmark.candidates import Candidate
from shd_diffusion.benchmark.count import Counted, Run, allocated_bytes, count, weight_bytes
from shd_diffusion.benchmark.turns import Spread, ratio, spread, take_turns
from shd_diffusion.models.denoiser import count_parameters

LEAST_SECONDS = 0.02
"""That a turn lasts: a call that is shorter is repeated."""

What = Literal["call", "image"]


@dataclass(frozen=True, slots=True)
class Size:
    """What does not depend on the batch.

    Attributes:
        parameters: of the denoiser.
        macs_call: multiply-adds of a call of the denoiser on one sample.
        macs_image: of an image, with all that its pipeline does; None without a pipeline.
        calls_per_image: samples that the denoiser is given for an image: steps, and twice as many with guidance.
    """

    parameters: int
    macs_call: int
    macs_image: int | None
    calls_per_image: int | None


@dataclass(frozen=True, slots=True)
class Timing:
    """A call of the denoiser, or the sampling of images.

    Attributes:
        what: of them.
        batch_size: samples or images at once.
        seconds: of all of them together.
        per_second: samples or images, at the median.
        peak_bytes: weights, and the most that is held beside them.
        ratio: of the seconds to the first candidate's, round by round.
    """

    what: What
    batch_size: int
    seconds: Spread
    per_second: float
    peak_bytes: int
    ratio: Spread


def runs_of(
    candidates: Sequence[Candidate], batch_sizes: Sequence[int], images: bool
) -> list[tuple[What, int]]:
    """What is measured, in its order; images where every candidate makes them and they are wanted."""
    kinds: list[What] = ["call"]
    if images and all(candidate.sampler is not None for candidate in candidates):
        kinds.append("image")
    return [(kind, size) for size in batch_sizes for kind in kinds]


def make_run(candidate: Candidate, what: What, batch_size: int) -> Run:
    """A run of a candidate, without gradients."""
    run = candidate.calls(batch_size) if what == "call" else candidate.images(batch_size)
    return torch.no_grad()(run)


def count_candidate(
    candidate: Candidate, keys: Sequence[tuple[What, int]], done: Callable[[], object]
) -> dict[tuple[What, int], Counted]:
    """Count every run of a candidate, which is not compiled."""
    found = {}
    for what, batch_size in keys:
        models = [candidate.denoiser] if what == "call" else candidate.models
        found[what, batch_size] = count(make_run(candidate, what, batch_size), candidate.denoiser, models)
        done()
    return found


def size_of(denoiser: ModelMixin, counted: Mapping[tuple[What, int], Counted]) -> Size:
    """What a candidate's counts say of one sample and one image."""
    (_, batch_size), *_ = counted
    call, image = counted["call", batch_size], counted.get(("image", batch_size))
    return Size(
        count_parameters(denoiser),
        call.macs // call.samples,
        None if image is None else image.macs // batch_size,
        None if image is None else image.samples // batch_size,
    )


def time_candidates(
    candidates: Mapping[str, Candidate],
    keys: Sequence[tuple[What, int]],
    counted: Mapping[str, Mapping[tuple[What, int], Counted]],
    rounds: int,
    device: torch.device,
    done: Callable[[], object],
) -> dict[str, list[Timing]]:
    """Time every run of all candidates, each warmed up, and measure what memory it takes.

    Args:
        counted: the bytes that are told where the device does not say what it has given.
        done: called after every turn.
    """
    found: dict[str, list[Timing]] = {name: [] for name in candidates}
    first = next(iter(candidates))
    for key in keys:
        what, batch_size = key
        runs = {name: _synchronised(make_run(each, *key), device) for name, each in candidates.items()}
        repeats, peaks = {}, {}
        for name, run in runs.items():
            peaks[name] = _peak(candidates[name], what, run, counted[name][key], device)
            repeats[name] = _repeats(run) if what == "call" else 1
        repeated = {name: _repeated(run, repeats[name]) for name, run in runs.items()}
        seconds = take_turns(repeated, rounds, warm=what == "call", done=done)
        alone = {name: [each / repeats[name] for each in taken] for name, taken in seconds.items()}
        for name, taken in alone.items():
            middle = spread(taken)
            against = ratio(taken, alone[first])
            speed = batch_size / middle.median
            found[name].append(Timing(what, batch_size, middle, speed, peaks[name], against))
    return found


def _peak(candidate: Candidate, what: What, run: Run, counted: Counted, device: torch.device) -> int:
    """Bytes of the weights that a run needs and of what it holds beside them; it runs at least once meanwhile."""
    beside = counted.peak_bytes
    run()  # compiles, and finds the fastest kernels, which takes memory once
    if device.type == "cuda":
        beside = allocated_bytes(run, device)
    return weight_bytes([candidate.denoiser] if what == "call" else candidate.models) + beside


def _synchronised(run: Run, device: torch.device) -> Run:
    """A run that ends when the device has."""

    def ending() -> None:
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return ending


def _repeats(run: Run) -> int:
    began = time.perf_counter()
    run()
    return max(1, math.ceil(LEAST_SECONDS / (time.perf_counter() - began)))


def _repeated(run: Run, times: int) -> Run:
    def repeating() -> None:
        for _ in range(times):
            run()

    return repeating
