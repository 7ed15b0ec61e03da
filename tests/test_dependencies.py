"""Files import at their top what the package itself depends on, and libraries of its extras where they are used."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator

from commands import ROOT

# Files that are themselves imported where they are used, by the library that they need.
LATER = {"models/prompt_words.py": {"transformers"}}
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "scikit_learn": "sklearn", "fonttools": "fontTools"}


def test_a_bare_installation_can_import_every_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", name)[0].replace("-", "_") for name in project["dependencies"]}
    known = {IMPORTED_AS.get(name, name) for name in names} | set(sys.stdlib_module_names) | {"shd_diffusion"}
    for file in sorted((ROOT / "shd_diffusion").rglob("*.py")):
        inside = file.relative_to(ROOT / "shd_diffusion").as_posix()
        modules = set(_modules(ast.parse(file.read_text(encoding="utf-8"))))
        libraries = {module.partition(".")[0] for module in modules}
        assert libraries - known == LATER.get(inside, set()), inside
        for later in LATER:
            module = f"shd_diffusion.{later.removesuffix('.py').replace('/', '.')}"
            assert module not in modules, inside


def _modules(tree: ast.Module) -> Iterator[str]:
    """What the statements of a file import, those within functions and `if TYPE_CHECKING` apart."""
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield statement.module
