"""Launch file: the same as `shd-diffusion report ...`."""

import typer

from shd_diffusion.cli import report

if __name__ == "__main__":
    typer.run(report)
