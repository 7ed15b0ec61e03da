"""Launch file: `accelerate launch pipelines/sample.py ...` is the same as `shd-diffusion sample ...`."""

import typer

from shd_diffusion.cli import sample

if __name__ == "__main__":
    typer.run(sample)
