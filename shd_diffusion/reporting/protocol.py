"""What the figures depend on: protocols and configs side by side, and where they differ."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shd_diffusion.protocol import OF_THE_MODEL, flatten
from shd_diffusion.reporting.runs import Run

UNSET = ("None", "{}", "[]")


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting in every run, as text; "–" where a run has none."""

    key: str
    values: list[str]
    differs: bool

    @property
    def shared(self) -> bool:
        return len(set(self.values)) == 1


def compare(runs: Sequence[Run], tree_of: Callable[[Run], Mapping[str, Any] | None]) -> list[Setting]:
    """Every setting of these runs, those first that differ between the runs that have settings at all."""
    trees = [{key: str(value) for key, value in flatten(tree_of(run) or {}).items()} for run in runs]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    settings = [
        Setting(
            key,
            values=[tree.get(key, "–") for tree in trees],
            differs=len({tree.get(key) for tree in trees if tree}) > 1,
        )
        for key in keys
    ]
    return sorted(settings, key=lambda setting: not setting.differs)


def compare_protocols(runs: Sequence[Run]) -> list[Setting]:
    """The evaluation's protocol in every run."""
    return compare(runs, lambda run: run.metrics.protocol if run.metrics else None)


def protocol_warning(runs: Sequence[Run]) -> str | None:
    """Why the figures of these runs do not compare; None if they do."""
    differing = [s.key for s in compare_protocols(runs) if s.differs and s.key not in OF_THE_MODEL]
    return (
        f"These figures do not compare: the protocols differ in {', '.join(differing)}."
        if differing
        else None
    )


def protocol_line(runs: Sequence[Run]) -> str:
    """The protocol that the evaluated runs share, in one line."""
    evaluated = [run for run in runs if run.metrics]
    if not evaluated:
        return "Not evaluated yet."
    shared = [s for s in compare_protocols(evaluated) if not s.differs and s.key not in OF_THE_MODEL]
    parts = (f"{s.key.replace('_', ' ')} {_short(s.values[0])}" for s in shared if s.values[0] not in UNSET)
    return f"Protocol: {'; '.join(parts)}."


def _short(value: str) -> str:
    """A hash by its first twelve digits, a number by four."""
    if re.fullmatch(r"[0-9a-f]{40,}", value):
        return value[:12]
    return f"{float(value):.4g}" if re.fullmatch(r"\d+\.\d{4,}", value) else value
