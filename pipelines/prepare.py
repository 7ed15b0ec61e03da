"""Launch file: `accelerate launch pipelines/prepare.py ...` is the same as `shd-diffusion prepare ...`."""

import typer

from shd_diffusion.cli import prepare

if __name__ == "__main__":
    typer.run(prepare)
