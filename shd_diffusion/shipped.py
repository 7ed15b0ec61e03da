"""The configs that come with the package: in a checkout those of the repository, in an installed wheel a copy."""

from __future__ import annotations

import shutil
from pathlib import Path

from shd_diffusion.errors import UserError

CONFIGS = Path(__file__).parent / "configs"


def find_config(path: Path) -> Path:
    """A config, or a folder of some: `configs/...` is the package's own where there is nothing of that name here."""
    shipped = CONFIGS.parent / path
    return shipped if not path.exists() and path.parts[:1] == ("configs",) and shipped.exists() else path


def copy_configs(to: Path) -> None:
    """Copy all configs of the package into a new folder; where they name one another, they name the copies.

    Raises:
        UserError: there is something of that name already.
    """
    if to.exists():
        raise UserError(f"{to}: exists already; give a folder that does not")
    shutil.copytree(CONFIGS, to)
    for file in to.rglob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace("configs/", f"{to.as_posix()}/"), encoding="utf-8")
