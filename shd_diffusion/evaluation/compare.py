"""The metrics of two evaluations side by side, if they were computed under the same protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shd_diffusion.errors import UserError
from shd_diffusion.progress import announce
from shd_diffusion.protocol import differing

if TYPE_CHECKING:
    from shd_diffusion.statistics import Estimate


def compare_metrics(first: Any, second: Any, anyway: bool = False) -> dict[str, dict[str, float | None]]:
    """The metrics that two `metrics.json` have in common: `first`, `second` and `difference` of each.

    Students that were compared with one teacher at equal noise also have the 95 % intervals of their differences, image
    by image; where that was another comparison, a line on standard error says in what.

    Args:
        anyway: compare them though their protocols differ.

    Raises:
        UserError: one is no `metrics.json`, or their protocols differ; then the message has the differing lines.
    """
    for position, content in (("first", first), ("second", second)):
        if not isinstance(content, Mapping) or not isinstance(content.get("protocol"), Mapping):
            raise UserError(
                f"the {position} file holds no metrics of an evaluation with their `protocol`; "
                "give the `metrics.json` of two evaluations"
            )
    lines = differing(first["protocol"], second["protocol"])
    if lines and not anyway:
        raise UserError(
            "; ".join(["these metrics cannot be compared (--anyway does it), their protocols differ", *lines])
        )
    metrics = {
        key: {"first": first[key], "second": second[key], "difference": second[key] - first[key]}
        for key in first
        if all(isinstance(metrics.get(key), int | float) for metrics in (first, second))
    }
    return metrics | _against_teacher(*(content.get("against_teacher") for content in (first, second)))


def _against_teacher(first: Any, second: Any) -> dict[str, dict[str, float | None]]:
    """The paired differences of two students from one teacher, with their 95 % intervals; none of others, which is said
    where both were compared with one."""
    if not (first and second):
        return {}
    if lines := differing(first["protocol"], second["protocol"]):
        announce("; ".join(["against_teacher: left out, the protocols differ", *lines]))
        return {}
    return {
        f"against_teacher.{name}": {
            "first": first[name]["mean"],
            "second": second[name]["mean"],
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
        }
        for name, difference in paired_difference(first["per_image"], second["per_image"]).items()
    }


def paired_difference(
    first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]], seed: int = 0
) -> dict[str, Estimate]:
    """Second student minus first, by each measure that both have, with its 95 % interval by the bootstrap over pairs.

    Raises:
        ValueError: they are of different numbers of images.
    """
    from shd_diffusion.statistics import bootstrap  # scipy takes a second

    return {
        name: bootstrap([b - a for a, b in zip(values, second[name], strict=True)], seed)
        for name, values in first.items()
        if name in second
    }
