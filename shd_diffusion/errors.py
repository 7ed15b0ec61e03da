"""Exceptions that a person is meant to read, and what their messages are made of."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """Something the user can fix: the message is one line that names the file, the key and the fix.

    The command line prints the message and exits with `exit_code`. What is wrong with the input is found before
    anything is written.
    """

    exit_code = 2


class DivergedError(UserError):
    """A training that was ended since its numbers were not finite; its checkpoints are kept."""

    exit_code = 3


def one_line(error: object) -> str:
    """What an error of another library says, in one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def printable_path(path: str | Path) -> str:
    """A path in one line of UTF-8, which file names need not be."""
    return os.fsencode(path).decode("utf-8", "backslashreplace").replace("\n", "\\n")


OUT_OF_MEMORY = 4
"""The exit code of what does not fit into memory. Other runs of a study may."""


def refusal(error: BaseException) -> str | None:
    """What the machine has refused, in one line with the fix; None of an error that is no refusal but a fault here."""
    if isinstance(error, OSError) and error.strerror is not None:
        name = f"{printable_path(os.fspath(error.filename))}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{name}{error.strerror}; make room, and the same command goes on from what is finished"
        return f"{name}{error.strerror}; see to its path and permissions, or give another"
    if isinstance(error, RecursionError):
        return "something given is nested too deeply to be read; give it flatter"
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}"):
        return f"out of memory ({one_line(error)[:200]})"
    return None


_OUT_OF_MEMORY = re.compile(
    r"^OutOfMemoryError|^(Runtime|Accelerator)Error: .*(can't allocate memory|bad_alloc|out of memory|_ALLOC_FAILED)",
    re.DOTALL,
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at what an unknown name was meant to be: the closest of the known ones, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"
