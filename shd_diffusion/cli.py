"""The command line: one command a stage, each also a launch file in pipelines/ or eval/."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec

import typer

from shd_diffusion.config import DistillConfig, RunConfig, TrainTeacherConfig, override_config, read_config
from shd_diffusion.errors import UserError
from shd_diffusion.run_folder import RunFolder

app = typer.Typer(
    name="shd-diffusion",
    help="Squeezing-Heads Distillation: a diffusion student with fewer attention heads than its teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key, e.g. train.max_steps=100."),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="The run folder; default: the config's.")
]

Arguments = ParamSpec("Arguments")


def stage(function: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Errors that a person can mend end a command with one line and exit code 2, Ctrl-C with 130."""

    @functools.wraps(function)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            typer.echo(
                "\ninterrupted; what was finished is kept, the same command goes on from there", err=True
            )
            raise typer.Exit(130) from None

    return guarded


@app.command("train-teacher")
@stage
def train_teacher(config: ConfigFile, set_: Overrides = None, output: Output = None) -> None:
    """Train a teacher on the denoising loss alone."""
    from shd_diffusion.training.stages import train_teacher as run_stage

    parsed = read_config(config, TrainTeacherConfig, set_ or [])
    run_stage(parsed, _output(parsed, output, config), str(config))


@app.command()
@stage
def distill(config: ConfigFile, set_: Overrides = None, output: Output = None) -> None:
    """Train a student from a teacher."""
    from shd_diffusion.training.stages import distill as run_stage

    parsed = read_config(config, DistillConfig, set_ or [])
    run_stage(parsed, _output(parsed, output, config), str(config))


@app.command()
@stage
def sample(runs: Runs, set_: Overrides = None) -> None:
    """Sample images from finished runs into their `samples/`."""
    from shd_diffusion.sampling.stage import sample_run

    for run in map(RunFolder, runs):
        sample_run(run, override_config(run.read_config(), set_ or [], str(run.config_file)))


@app.command()
@stage
def evaluate(runs: Runs, set_: Overrides = None) -> None:
    """Compute the figures of sampled images; they are printed as JSON and kept in `evaluation/metrics.json`."""
    from shd_diffusion.evaluation.stage import evaluate_samples

    for run in map(RunFolder, runs):
        evaluate_samples(run, override_config(run.read_config(), set_ or [], str(run.config_file)))


@app.command()
@stage
def report(
    runs: Runs,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The HTML page to write.")
    ] = None,
) -> None:
    """Write one page that shows and compares runs."""
    from shd_diffusion.reporting import print_table, write_report

    page = write_report(runs, output or (runs[0] if len(runs) == 1 else runs[0].parent) / "report.html")
    typer.echo(f"report: {page}")
    print_table(runs)


def _output(config: RunConfig, output: Path | None, source: Path) -> Path:
    if output is None and config.output is None:
        raise UserError(f"{source}: key `output` is missing; add it or give --output DIR")
    return output or Path(str(config.output))


def main() -> None:
    """Entry point of the installed command."""
    app()


if __name__ == "__main__":
    main()
