"""The processes of a launch, on whatever they run."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from shd_diffusion.errors import UserError, one_line
from shd_diffusion.progress import announce

Found = TypeVar("Found")


def processes() -> PartialState:
    """All processes that were launched, joined: by NCCL or its like on accelerators, by gloo on CPUs.

    accelerate joins processes on CPUs only when it is told that these are all there is. Otherwise each of them
    would believe that it is alone, and all would write the same files.

    Raises:
        UserError: they could not be joined, or fewer than the launcher started.
    """
    try:
        launched = int(os.environ.get("WORLD_SIZE", 1))
        # Who dies takes the others down by the launcher; who is slow, over images or shards, is waited for.
        state = PartialState(cpu=not _has_accelerator(), timeout=timedelta(days=7))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE, RANK, MASTER_ADDR: processes cannot be joined by these ({one_line(error)}); launch them by "
            "torchrun, or unset them"
        ) from error
    if state.num_processes != launched:
        raise UserError(
            f"WORLD_SIZE: {launched} processes were launched, but only {state.num_processes} joined; "
            "on CPUs launch with `torchrun --nproc_per_node N`"
        )
    atexit.unregister(state.destroy_process_group)
    atexit.register(state.destroy_process_group)  # once, however often this is called
    if state.is_main_process:
        tell_launch(state.num_processes, state.device.type)
    return state


def _has_accelerator() -> bool:
    """Whether there is one to compute on: Apple's have no float64, in which noise levels and least squares are."""
    return torch.accelerator.is_available() and not torch.backends.mps.is_available()


def by_main_process(find: Callable[[], Found]) -> Found:
    """What the main process finds, in every process, and so what a person can fix. Every process must call this."""
    found: tuple[Any, UserError | None] = None, None
    if processes().is_main_process:
        try:
            found = find(), None
        except UserError as error:
            found = None, error
    ((value, fault),) = broadcast_object_list([found])
    if fault is not None:
        raise fault
    return value


@cache
def tell_launch(count: int, device: str) -> None:
    """Say once how many processes a launcher has started, which need not be as many as it was told."""
    by_accelerate = any(name.startswith("ACCELERATE_") for name in os.environ)
    if count > 1:
        announce(f"{count} processes ({device})")
    elif by_accelerate and device == "cpu":
        announce(
            "1 process (cpu): `accelerate launch --cpu` starts one whatever it is told; `torchrun --nproc_per_node N` "
            "starts N"
        )
    elif by_accelerate:
        announce(f"1 process ({device})")
