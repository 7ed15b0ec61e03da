"""Each message in docs/troubleshooting.md is one that the code says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from commands import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)


def texts() -> Iterator[str]:
    """All strings of the code, `\0` for what is filled in."""
    for file in sorted((ROOT / "shd_diffusion").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


TEXTS = [text.replace("`", "") for text in texts()]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_says_so(message: str) -> None:
    pattern = ".*".join(map(re.escape, re.split(" ?… ?", message)))
    assert any(re.search(pattern, text, re.DOTALL) for text in TEXTS), "see what it is called now"


def test_there_are_some() -> None:
    assert len(MESSAGES) == PAGE.count("\n### ") >= 20
