"""Where a run took place: versions, machine, commit and command, as `environment.json` has it of each session."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("shd-diffusion", "torch", "diffusers", "accelerate", "torch-fidelity", "numpy")


def describe_environment() -> dict[str, Any]:
    """Everything beside the config that a result may depend on."""
    return {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "commit": _commit(),
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of the source tree, with `-dirty` behind it where files differ; None outside of a checkout.

    A package that is installed below another repository is no file of that one, or, where its environments are
    committed, a file elsewhere.
    """
    here = Path(__file__)
    try:
        if _git("ls-files", "--full-name", here.name) != f"{here.parent.name}/{here.name}":
            return None
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _program() -> str:
    """The installed command, or the launch file that python, torchrun or accelerate were given."""
    started = Path(sys.argv[0])
    room = started.parent.name
    return f"{room}/{started.name}" if room in ("pipelines", "eval") else "shd-diffusion"


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(
        ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
    ).stdout.strip()
