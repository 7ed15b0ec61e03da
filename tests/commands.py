"""The command line, run in this process or in one of its own."""

from __future__ import annotations

from pathlib import Path

from forks import Fork

ROOT = Path(__file__).parents[1]
TEACHER_CONFIG = ROOT / "configs" / "digits" / "teacher.yaml"
DISTILL_CONFIG = ROOT / "configs" / "digits" / "distill.yaml"
SHORT = ["train.max_steps=20", "train.batch_size=16", "train.checkpoint_every=10", "train.log_every=5"]
FEW_IMAGES = ["sample.num_images=24", "sample.num_inference_steps=3"]


def sets(*overrides: str) -> list[str]:
    """Overrides as arguments of the command line."""
    return [part for override in overrides for part in ("--set", override)]


def command(*arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, standard output, standard error."""
    from typer.testing import CliRunner

    from shd_diffusion.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def start(*arguments: object) -> Fork:
    """Start the command line in a process of its own."""
    return Fork("shd_diffusion.cli:main", *arguments)
