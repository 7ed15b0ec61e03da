"""Launch file: `accelerate launch pipelines/train_teacher.py ...` is the same as `shd-diffusion train-teacher ...`."""

import typer

from shd_diffusion.cli import train_teacher

if __name__ == "__main__":
    typer.run(train_teacher)
