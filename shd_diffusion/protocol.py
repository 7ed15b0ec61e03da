"""Protocols as flat keys: what metrics depend on, and which of it makes them another measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OF_THE_MODEL = frozenset({"steps_trained", "steps_planned", "ema_decay", "pipeline_sha256"})
"""Protocol keys that say what was measured, not how: metrics that differ in them are meant to be compared."""


SPELLED = {"reference": "reference_sha256", "clip_model.name": "clip_model.sha256"}
"""Protocol keys that name what a hash beside them tells: where the hashes are equal, other names are the same thing."""


def are_alike(key: str, protocols: Sequence[Mapping[str, Any]]) -> bool:
    """Whether flat protocols agree in a key, as far as measurements go."""
    if key in OF_THE_MODEL:
        return True
    for each in (key, SPELLED.get(key)):
        values = [] if each is None else [protocol.get(each) for protocol in protocols]
        if values and all(value == values[0] for value in values) and (each == key or values[0] is not None):
            return True
    return not protocols


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """`key: value | value` for every key in which two protocols differ; "–" where one lacks it."""
    left, right = flatten(first), flatten(second)
    return [
        f"{key}: {left.get(key, '–')} | {right.get(key, '–')}"
        for key in dict.fromkeys([*left, *right])
        if not are_alike(key, [left, right])
    ]
