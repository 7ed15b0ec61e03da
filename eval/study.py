"""Launch file: the same as `shd-diffusion study ...`."""

import typer

from shd_diffusion.cli import study

if __name__ == "__main__":
    typer.run(study)
