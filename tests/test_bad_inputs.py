"""A part of eval/try_bad_inputs.py: configs, and files that are damaged, through the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from try_bad_inputs import Case, attempt, cases, make_world

PER_GROUP = 10
"""Cases of each group, evenly spread; the script tries all."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("bad") / "world"
    make_world(world)
    return world


def some(world: Path, group: str) -> list[Case]:
    found = [case for case in cases(world) if case.group == group]
    assert len(found) > 9
    return found[:: -(-len(found) // PER_GROUP)]


@pytest.mark.parametrize(
    "group",
    [
        "values of a config",
        "configs",
        "options",
        "places",
        "damaged files",
        "values in files",
        "pictures",
        "arrays",
    ],
)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(group: str, world: Path) -> None:
    wrong = {case.name: found for case in some(world, group) if (found := attempt(case, world))}
    assert not wrong
