"""docs/commands.md: every command with its arguments and options, from the functions that carry them out.

python docs/make_commands.py > docs/commands.md
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from typer.models import ArgumentInfo, OptionInfo

from shd_diffusion.cli import app

HEAD = """# Commands

Written by `python docs/make_commands.py`; a test sees that it is current. Each is `shd-diffusion COMMAND`, and `--help`
behind it tells the same. How they go together stands in [usage.md](usage.md), the keys of `--set` in
[keys.md](keys.md). Exit codes: 0; 2 for what a person can mend; 3 for a training that diverged; 130 after Ctrl-C; 128
and the signal's number where a signal ended a training.
"""


@dataclass(frozen=True)
class Parameter:
    """An argument, if `option` is None, or an option with what stands behind it."""

    option: str | None
    value: str
    meaning: str
    default: Any

    @property
    def row(self) -> str:
        told = " ".join(filter(None, (self.option, self.value)))
        default = f"`{self.default}`" if self.default not in (None, False) else ""
        if self.default is inspect.Parameter.empty:
            default = "**must be given**"
        return f"| `{told}` | {self.meaning} | {default} |"


def page() -> str:
    """The whole page, command by command, in the order of `--help`."""
    return "\n".join([HEAD, *(_section(each.name, each.callback) for each in app.registered_commands)])


def _section(name: str | None, function: Callable[..., None] | None) -> str:
    """A command: its docstring, how it is written, a table of its arguments and options."""
    assert function is not None
    name = name or function.__name__.replace("_", "-")
    hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    signature = inspect.signature(function).parameters
    parameters = [_parameter(key, hints[key], given.default) for key, given in signature.items()]
    arguments = [each for each in parameters if each.option is None]
    words = [a.value if a.default is inspect.Parameter.empty else f"[{a.value}]" for a in arguments]
    needed = [a for a in parameters if a.option is not None and a.default is inspect.Parameter.empty]
    words += [f"{a.option} {a.value.split(', ')[0]}" for a in needed]  # of several choices the first
    rows = [each.row for each in sorted(parameters, key=lambda each: each.option is not None)]
    usage = f"```sh\nshd-diffusion {' '.join([name, *words])}\n```"
    table = "\n".join(["| | | default |", "|---|---|---|", *rows])
    return "\n\n".join([f"## `{name}`", " ".join((function.__doc__ or "").split()), usage, table]) + "\n"


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    kind, info = typing.get_args(hint)[:2]
    meaning = info.help or ""
    if isinstance(info, ArgumentInfo):
        return Parameter(None, info.metavar or name.upper(), meaning, default)
    assert isinstance(info, OptionInfo)
    names = (info.default, *(info.param_decls or ()))  # what is given first is kept as the default
    option = next((each for each in names if str(each).startswith("--")), None)
    return Parameter(option or f"--{name.replace('_', '-')}", info.metavar or _value(kind), meaning, default)


def _value(kind: Any) -> str:
    """What stands behind an option that has no name for it: nothing behind a flag."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = typing.get_args(kind)[0]
    if typing.get_origin(kind) is Literal:
        return ", ".join(typing.get_args(kind))
    return {bool: "", int: "N", float: "NUMBER"}.get(kind, "TEXT")


if __name__ == "__main__":
    print(page(), end="")
