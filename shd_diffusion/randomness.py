"""Randomness by index: what is drawn follows from a seed and names, never from what was drawn before.

So results do not depend on the batch size, the number of processes, or where a run was interrupted.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *names: int | str) -> torch.Generator:
    """A CPU generator that follows from the seed and the names alone, e.g. `generator(0, "noise", step)`."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *names))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
