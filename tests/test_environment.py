"""A commit is told of a checkout alone, not of somebody else's repository that the package lies in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from shd_diffusion import environment


@pytest.mark.parametrize(
    ("place", "committed", "told"), [("", True, True), ("", False, False), ("venv/lib", True, False)]
)
def test_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, committed: bool, told: bool
) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    file = tmp_path / place / "shd_diffusion" / "environment.py"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "theirs").touch()
    git("init", "-q")
    git("add", *(["."] if committed else ["theirs"]))
    git("commit", "-qm", "theirs")
    monkeypatch.setattr(environment, "__file__", str(file))
    assert environment._commit() == (git("rev-parse", "HEAD") if told else None)
