"""What a model is, in one number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

# What transformers writes into a config that says nothing of the function; the weights' dtype is hashed with them.
_NOT_THE_MODEL = {"architectures", "dtype", "torch_dtype", "transformers_version"}


def hash_model(model: Any) -> str:
    """SHA-256 of a model's config and weights, of diffusers or transformers; where it was loaded from is no part."""
    config = _without(model.config if isinstance(model.config, Mapping) else model.config.to_dict())
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().flatten().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _without(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what says nothing of the function, in those that it nests too."""
    return {
        key: _without(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key not in _NOT_THE_MODEL
    }
