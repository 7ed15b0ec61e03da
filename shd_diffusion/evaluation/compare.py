"""Two sets of figures side by side, if they were computed under the same protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shd_diffusion.errors import UserError

OF_THE_MODEL = frozenset({"steps_trained", "ema_decay"})
"""Protocol keys that say what was measured, not how: figures that differ in them are meant to be compared."""


def differing_protocol(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """`key: value | value` for every key in which two protocols differ; "–" where one lacks it."""
    left, right = flatten(first), flatten(second)
    keys = [key for key in dict.fromkeys([*left, *right]) if key not in OF_THE_MODEL]
    return [
        f"{key}: {left.get(key, '–')} | {right.get(key, '–')}"
        for key in keys
        if left.get(key) != right.get(key)
    ]


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], anyway: bool = False
) -> dict[str, dict[str, float]]:
    """The figures that two metrics.json have in common: `first`, `second` and `difference` of each.

    Args:
        anyway: compare them though their protocols differ.

    Raises:
        UserError: the protocols differ; the message has the differing lines.
    """
    differing = differing_protocol(first.get("protocol", {}), second.get("protocol", {}))
    if differing and not anyway:
        lines = "\n  ".join(differing)
        raise UserError(
            f"these figures cannot be compared (--anyway does it), their protocols differ:\n  {lines}"
        )
    return {
        key: {"first": first[key], "second": second[key], "difference": second[key] - first[key]}
        for key in first
        if all(isinstance(figures.get(key), int | float) for figures in (first, second))
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys with values as text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
