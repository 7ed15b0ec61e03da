"""Protocols as flat keys: what metrics depend on, and which of it makes them another measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OF_THE_MODEL = frozenset({"steps_trained", "steps_planned", "ema_decay", "pipeline_sha256"})
"""Protocol keys that say what was measured, not how: metrics that differ in them are meant to be compared."""


SPELLED = {"reference": "reference_sha256", "clip_model.name": "clip_model.sha256"}
"""Protocol keys that name what a hash beside them tells: where the hashes are equal, other names are the same thing."""


def is_of_step(protocol: Mapping[str, Any], step: int) -> bool:
    """Whether images or metrics are of a model after so many steps, as far as they tell."""
    return protocol.get("steps_trained", step) == step


def are_alike(key: str, protocols: Sequence[Mapping[str, Any]]) -> bool:
    """Whether flat protocols agree in a key, as far as measurements go."""

    def equal(name: str) -> bool:
        return all(protocol.get(name) == protocols[0].get(name) for protocol in protocols)

    if key in OF_THE_MODEL or equal(key):
        return True
    told = SPELLED.get(key)
    return told is not None and protocols[0].get(told) is not None and equal(told)


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
