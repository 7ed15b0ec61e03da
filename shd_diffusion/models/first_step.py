"""A pipeline's call up to its scheduler's first step."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

from diffusers import DiffusionPipeline


class _FirstStep(Exception):
    """Ends the call."""


@contextlib.contextmanager
def until_first_step(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Calls of the pipeline end, without a result, where its scheduler would take its first step.

    Its scheduler is left as it is: a copy takes its place meanwhile.
    """
    scheduler = pipeline.scheduler
    pipeline.__dict__["scheduler"] = _stopping(scheduler)
    try:
        with contextlib.suppress(_FirstStep):
            yield
    finally:
        pipeline.__dict__["scheduler"] = scheduler


def _stopping(scheduler: Any) -> Any:
    """A copy of a scheduler whose step ends the call."""
    stopping = copy.deepcopy(scheduler)

    @functools.wraps(scheduler.step)  # pipelines look at its signature
    def step(*_: Any, **__: Any) -> None:
        raise _FirstStep

    stopping.step = step
    return stopping
