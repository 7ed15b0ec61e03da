"""docs/commands.md is what the command line takes."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_commands_is_current() -> None:
    made = runpy.run_path(str(DOCS / "make_commands.py"), run_name="make_commands")["page"]()
    assert made == (DOCS / "commands.md").read_text(encoding="utf-8"), (
        "run: python docs/make_commands.py > docs/commands.md"
    )
    for row in (
        "| `--set KEY=VALUE` | Override a config key",
        " | Whose checkpoint it is. | **must be given** |",
        "| `--dry-run` | Build without",
        "| `--rounds N` | Turns that each model takes. | `10` |",
    ):
        assert row in made
