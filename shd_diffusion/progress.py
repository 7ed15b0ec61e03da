"""Progress bars on standard error, so that standard output stays free for results."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str, done: int = 0, visible: bool = True) -> tqdm:
    """A bar with what is done, how fast, and how long still; in a log file a line every ten seconds."""
    interactive = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        file=sys.stderr,
        disable=not visible,
        dynamic_ncols=interactive,
        mininterval=0.2 if interactive else 10.0,
        maxinterval=10.0,
    )


def announce(message: str) -> None:
    """Tell a person something that is not a result."""
    print(printable(message), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text with control characters, line breaks and stray bytes of file names written out: `\\x1b` for an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
