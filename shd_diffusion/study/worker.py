"""A process of a study: several commands of the command line, one after another, until one fails."""

from __future__ import annotations

import json
import signal
import sys

from shd_diffusion.cli import app


def main() -> None:
    """Run the commands given as JSON, a list of lists of arguments."""
    # a study in the background ignores SIGINT, and hands that on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for command in json.loads(sys.argv[1]):
        sys.argv = ["shd-diffusion", *command]  # what environment.json records
        if code := app(command, standalone_mode=False):
            sys.exit(code)


if __name__ == "__main__":
    main()
