"""Launch file: `accelerate launch pipelines/distill.py ...` is the same as `shd-diffusion distill ...`."""

import typer

from shd_diffusion.cli import distill

if __name__ == "__main__":
    typer.run(distill)
