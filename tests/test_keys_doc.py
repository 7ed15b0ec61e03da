"""docs/keys.md is what the models say."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_keys_is_current() -> None:
    made = runpy.run_path(str(DOCS / "make_keys.py"))["page"]()
    assert made == (DOCS / "keys.md").read_text(encoding="utf-8"), (
        "run: python docs/make_keys.py > docs/keys.md"
    )
    for row in (
        "| `max_steps` | whole number | **must be given** |",
        "| `temperature` | number | `1.0` | τ, softens",
    ):
        assert row in made
