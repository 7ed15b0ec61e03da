"""What the call of a text-to-image pipeline is told here that its own defaults leave to chance."""

from __future__ import annotations

import inspect
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available


def call_defaults(kind: type[DiffusionPipeline]) -> dict[str, Any]:
    """Arguments of the call of a pipeline class, where it takes them, which a config may set otherwise.

    Images have the size that a config gives them, not the nearest that a pipeline was trained on
    (`use_resolution_binning`). Captions are not cleaned where the packages for it are missing: the call would do the
    same, and say so each time.
    """
    defaults: dict[str, Any] = {"use_resolution_binning": False}
    if not (is_bs4_available() and is_ftfy_available()):
        defaults["clean_caption"] = False
    takes = inspect.signature(kind.__call__).parameters
    return {name: value for name, value in defaults.items() if name in takes}
