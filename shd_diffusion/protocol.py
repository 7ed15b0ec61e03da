"""Protocols as flat keys: what metrics depend on, and which of it makes them another measurement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OF_THE_MODEL = frozenset({"steps_trained", "steps_planned", "ema_decay", "pipeline_sha256"})
"""Protocol keys that say what was measured, not how: metrics that differ in them are meant to be compared."""


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
        if key not in OF_THE_MODEL and left.get(key) != right.get(key)
    ]
