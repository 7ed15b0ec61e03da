"""Launch file: the same as `shd-diffusion evaluate ...`."""

import typer

from shd_diffusion.cli import evaluate

if __name__ == "__main__":
    typer.run(evaluate)
