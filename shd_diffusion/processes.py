"""The processes of a launch, on whatever they run."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
from accelerate import PartialState

from shd_diffusion.errors import UserError


def processes() -> PartialState:
    """All processes that were launched, joined: by NCCL or its like on accelerators, by gloo on CPUs.

    accelerate joins processes on CPUs only when it is told that these are all there is. Otherwise each of them
    would believe that it is alone, and all would write the same files.

    Raises:
        UserError: fewer processes were joined than the launcher started.
    """
    # Who dies takes the others down by the launcher; who is slow, over images or shards, is waited for.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != launched:
        raise UserError(
            f"WORLD_SIZE: {launched} processes were launched, but only {state.num_processes} joined; "
            "on CPUs launch with `torchrun --nproc_per_node N`"
        )
    atexit.unregister(state.destroy_process_group)
    atexit.register(state.destroy_process_group)  # once, however often this is called
    return state
