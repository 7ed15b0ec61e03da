"""Launch file: the same as `shd-diffusion squeeze ...`."""

import typer

from shd_diffusion.cli import squeeze

if __name__ == "__main__":
    typer.run(squeeze)
