"""Launch file: the same as `shd-diffusion make-pipeline ...`."""

import typer

from shd_diffusion.cli import make_pipeline

if __name__ == "__main__":
    typer.run(make_pipeline)
