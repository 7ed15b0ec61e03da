"""A pipeline's call up to its scheduler's first step."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from diffusers import DiffusionPipeline


class _FirstStep(Exception):
    """Ends the call."""


@contextlib.contextmanager
def until_first_step(pipeline: DiffusionPipeline) -> Iterator[list[Any]]:
    """Calls of the pipeline end, without a result, where its scheduler would take its first step.

    Its scheduler is left as it is: a copy takes its place meanwhile. What is yielded gets what it is told: what was
    predicted, the timestep, and the noised sample.
    """
    scheduler, told = pipeline.scheduler, list[Any]()
    pipeline.__dict__["scheduler"] = _stopping(scheduler, told)
    try:
        with contextlib.suppress(_FirstStep):
            yield told
    finally:
        pipeline.__dict__["scheduler"] = scheduler


def _stopping(scheduler: Any, told: list[Any]) -> Any:
    """A copy of a scheduler whose step ends the call."""
    stopping, signature = copy.deepcopy(scheduler), inspect.signature(scheduler.step)

    @functools.wraps(scheduler.step)  # pipelines look at its signature
    def step(*args: Any, **kwargs: Any) -> None:
        told[:] = list(signature.bind(*args, **kwargs).arguments.values())[:3]
        raise _FirstStep

    stopping.step = step
    return stopping
