"""A process of a study: several commands of a command line, one after another, until one fails."""

from __future__ import annotations

import importlib
import json
import signal
import sys


def main() -> None:
    """Run commands, given as JSON (a list of lists of arguments), by the `app` of the module named before them."""
    # a study in the background ignores SIGINT, and hands that on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # is for submitit above it, which then sends another
    app = importlib.import_module(sys.argv[1]).app
    for command in json.loads(sys.argv[2]):
        sys.argv = ["shd-diffusion", *command]  # what environment.json records
        if code := app(command, standalone_mode=False):
            sys.exit(code)


if __name__ == "__main__":
    main()
