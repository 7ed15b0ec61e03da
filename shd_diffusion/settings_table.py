"""Settings of several runs side by side, and where they differ: protocols, configs, environments."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shd_diffusion.protocol import OF_THE_MODEL, are_alike, flatten

Trees = Sequence[Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting in every run, as text; "–" where a run has none."""

    key: str
    values: list[str]
    differs: bool

    @property
    def shared(self) -> bool:
        return len(set(self.values)) == 1


def settings_table(trees: Trees) -> list[Setting]:
    """Every setting of these runs, those first that differ between the runs that have settings at all."""
    flat = [{key: str(value) for key, value in flatten(tree or {}).items()} for tree in trees]
    settings = [
        Setting(
            key,
            values=[tree.get(key, "–") for tree in flat],
            differs=len({tree.get(key) for tree in flat if tree}) > 1,
        )
        for key in dict.fromkeys(key for tree in flat for key in tree)
    ]
    return sorted(settings, key=lambda setting: not setting.differs)


def protocol_warning(protocols: Trees) -> str | None:
    """Why the metrics of these runs do not compare; None if they do."""
    evaluated = [
        {key: str(value) for key, value in flatten(protocol).items()} for protocol in protocols if protocol
    ]
    differing = [s.key for s in settings_table(protocols) if not are_alike(s.key, evaluated)]
    if not differing:
        return None
    return f"These metrics do not compare: the protocols differ in {', '.join(differing)}."


def protocol_line(protocols: Trees) -> str:
    """The protocol that the evaluated runs share, in one line."""
    evaluated = [protocol for protocol in protocols if protocol is not None]
    if not evaluated:
        return "Not evaluated yet."
    shared = [s for s in settings_table(evaluated) if not s.differs and s.key not in OF_THE_MODEL]
    parts = [
        f"{s.key.replace('_', ' ')} {_short(s.values[0])}"
        for s in shared
        if s.values[0] not in ("None", "{}", "[]")
    ]
    return f"Protocol: {'; '.join(parts)}."


def _short(value: str) -> str:
    """A hash by its first twelve digits, a number by four."""
    if re.fullmatch(r"[0-9a-f]{40,}", value):
        return value[:12]
    return f"{float(value):.4g}" if re.fullmatch(r"\d+\.\d{4,}", value) else value
