"""Two sets of figures side by side, if they were computed under the same protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shd_diffusion.errors import UserError
from shd_diffusion.protocol import OF_THE_MODEL, flatten


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
        UserError: there are no protocols, or they differ; the message has the differing lines.
    """
    if "protocol" not in first or "protocol" not in second:
        raise UserError("these are not the figures of one evaluation each; give two `metrics.json`")
    differing = differing_protocol(first["protocol"], second["protocol"])
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
