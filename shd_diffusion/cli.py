"""The command line: one command a stage, each also a launch file in pipelines/ or eval/.

What takes seconds to import is imported where it is used, inside the guard against Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.metadata
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec

import typer

from shd_diffusion.errors import OUT_OF_MEMORY, UserError, refusal
from shd_diffusion.progress import printable
from shd_diffusion.shipped import find_config

app = typer.Typer(
    name="shd-diffusion",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see `configs`.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a config key, e.g. train.max_steps=100."),
]
Output = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="The run folder; default: the config's.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Build without weights or data, tell the costs as JSON.")
]

Finish = Annotated[
    bool,
    typer.Option(
        "--finish", help="Take no more steps: save what the last checkpoint has. It can go on later."
    ),
]

Checkpoint = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="STEP",
        help="A step of the run, or `latest`: also of one that was stopped, or trains.",
    ),
]

Arguments = ParamSpec("Arguments")


LIGHT = ("compare",)
"""Commands that import nothing that takes seconds."""

SHARED = ("prepare", "train_teacher", "distill", "sample", "evaluate")
"""Commands whose work several processes share; others would each do it again, in each other's way."""

LOWER = {
    "prepare": "prepare.batch_size",
    "train_teacher": "train.micro_batch_size",
    "distill": "train.micro_batch_size, losses.shd.chunk_rows",
    "sample": "sample.pass_size, sample.dtype",
    "evaluate": "evaluate.batch_size",
    "squeeze": "--samples",
    "compress": "--images",
}
"""What to lower where a command needs more memory than there is."""


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version("shd-diffusion"))
        raise typer.Exit


@app.callback(epilog="Begin with `shd-diffusion demo`, or with README.md: your own pictures and models.")
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Tell the version.")
    ] = False,
) -> None:
    """Squeezing-Heads Distillation: a diffusion student with fewer attention heads than its teacher."""


def _next(command: str, *arguments: object) -> None:
    """Say what can be done with what there is now."""
    from shd_diffusion.processes import processes
    from shd_diffusion.progress import announce

    if processes().is_main_process:
        announce(f"done; next: shd-diffusion {command} {shlex.join(map(str, arguments))}")


def _refuse_missing(given: dict[str, Any]) -> None:
    """Refuse a config or a run that is not there before anything is imported that takes seconds."""
    config = given.get("config")
    if isinstance(config, Path) and not find_config(config).exists():
        raise UserError(
            f"{config}: cannot be read ({os.strerror(errno.ENOENT)}); give the path of a config file"
        )
    for run in given.get("runs") or ():
        if not run.exists():
            raise UserError(f"{run}: no such folder, so it is not a run folder; give the folder of a run")


def _tell_loading() -> None:
    """Say to a person what is waited for."""
    if "torch" not in sys.modules and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        typer.echo("loading torch and diffusers ...", err=True)


def stage(function: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Errors that a person can fix, and what the machine refuses, end a command with one line and their exit code,
    Ctrl-C with 130. What is left is a fault of this project, and says so below its traceback."""

    @functools.wraps(function)
    def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a terminal may know ASCII only
        # No plot needs it, and of a wrong one Matplotlib cannot be imported.
        os.environ.pop("MPLBACKEND", None)
        try:
            launched = os.environ.get("WORLD_SIZE", "1")
            if launched not in ("", "1") and function.__name__ not in SHARED:
                raise UserError(
                    f"WORLD_SIZE: {launched} processes were launched, but `{function.__name__}` is for one; start it "
                    "without accelerate or torchrun, or unset WORLD_SIZE"
                )
            _refuse_missing(kwargs)
            if function.__name__ not in LIGHT:
                _tell_loading()
            function(*args, **kwargs)
        except UserError as error:
            typer.echo(f"error: {printable(str(error))}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo(
                "\ninterrupted; what was finished is kept, the same command goes on from there", err=True
            )
            raise typer.Exit(130) from None
        except BrokenPipeError:  # whoever read the output has enough
            raise
        except Exception as error:
            refused = refusal(error)
            if refused is None:
                if not hasattr(error, "__notes__"):  # by a command that this one carries out
                    error.add_note(
                        "This is a fault of shd-diffusion itself; please report it, with all of the above."
                    )
                raise
            code = UserError.exit_code
            if "out of memory" in refused:
                code = OUT_OF_MEMORY
                refused += f"; lower {LOWER.get(function.__name__, 'what is asked for')}"
            typer.echo(f"error: {printable(refused)}", err=True)
            raise typer.Exit(code) from None

    return guarded


# --- to begin with -------------------------------------------------------------------------------------------


@app.command()
@stage
def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="DIR",
            help="For the runs and the page; default: `runs/demo`, or `runs/emoji`.",
        ),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="From text to image, on emoji and their names.")
    ] = False,
    set_: Overrides = None,
) -> None:
    """The whole way on handwritten digits in minutes: train, distil, squeeze, sample, evaluate, report."""
    from shd_diffusion.demo import steps, text_steps

    output = output or Path("runs", "emoji" if text else "demo")
    planned = (text_steps if text else steps)(output, set_ or [])
    for number, step in enumerate(planned, 1):
        typer.echo(f"[{number}/{len(planned)}] {step.title}")
        sys.stdout.flush()  # in a log file, before what the step itself says
        if step.made is None or not step.made.exists():
            with contextlib.redirect_stdout(io.StringIO()) if step.quiet else contextlib.nullcontext():
                _run(step.command)
    typer.echo(
        f"done; open {output / 'report.html'}; next, your own pictures and models: shd-diffusion configs, "
        "and docs/usage.md"
    )


def _run(command: list[str]) -> None:
    """Carry out another command in this process, so that libraries are imported once."""
    sys.argv = ["shd-diffusion", *command]  # what environment.json records
    if code := app(command, standalone_mode=False):
        raise typer.Exit(code)


@app.command()
@stage
def configs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")] = Path("configs"),
) -> None:
    """Copy the configs that come with the package, to start your own from."""
    from shd_diffusion.shipped import copy_configs

    copy_configs(folder)
    typer.echo(f"configs: {folder}")


# --- before training -----------------------------------------------------------------------------------------


@app.command("make-pipeline")
@stage
def make_pipeline(config: ConfigFile, set_: Overrides = None, output: Output = None) -> None:
    """Make a text-to-image pipeline for a teacher to be trained in: text encoder, autoencoder, scheduler."""
    from shd_diffusion.config import read_config
    from shd_diffusion.training.text_pipeline import TextPipelineConfig, make_text_pipeline

    parsed = read_config(config, TextPipelineConfig, set_ or [])
    place = _output(parsed, output, config)
    make_text_pipeline(parsed, place, str(config))
    typer.echo(f"pipeline: {place}")


@app.command()
@stage
def prepare(config: ConfigFile, set_: Overrides = None, output: Output = None) -> None:
    """Encode images, and their captions, into a cache that models are trained on."""
    from shd_diffusion.config import read_prepare_config, training_of
    from shd_diffusion.data.prepare import prepare as run_stage

    parsed = read_prepare_config(config, set_ or [])
    run_stage(parsed, _output(parsed, output, config), str(config))
    if command := training_of(config):
        _next(command, config)


@app.command()
@stage
def show(
    config: ConfigFile,
    set_: Overrides = None,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The picture to write.")] = Path(
        "sheet.png"
    ),
) -> None:
    """Show what the models will see, as one picture: a row a class, after framing; of a cache, decoded latents."""
    from shd_diffusion.config import read_data_config
    from shd_diffusion.reporting.contact_sheet import write_sheet

    if output.suffix.lower() != ".png" or output.is_dir():
        raise UserError(f"--output {output}: give a .png file")
    write_sheet(read_data_config(config, set_ or []), output)
    typer.echo(f"sheet: {printable(str(output))}")


@app.command()
@stage
def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a model folder, a config, or a hub name.")
    ],
    student: Annotated[
        str | None, typer.Option("--student", metavar="OTHER", help="Show what it would learn.")
    ] = None,
) -> None:
    """List a model's attention blocks; with --student also the layer map, the merges that SHD would use, and DisWOT's
    score of the student before any training."""
    from rich.console import Console

    from shd_diffusion.analysis.diswot import diswot_score
    from shd_diffusion.models.denoiser import sample_shape
    from shd_diffusion.training.build import open_model
    from shd_diffusion.training.inspect_models import inspect_model, pair_rows, render, render_pair

    teacher = open_model(model)
    rows = inspect_model(teacher)
    Console().print(render(teacher, rows))
    if student is None:
        return
    other = open_model(student)
    student_rows = inspect_model(other)
    Console().print(render(other, student_rows))
    try:
        pairs = pair_rows(rows, student_rows)
    except ValueError as error:
        raise UserError(f"{model} and {student}: {error}") from error
    Console().print(render_pair(rows, student_rows, pairs))
    shape = sample_shape(teacher)
    if shape is None or shape != sample_shape(other):
        return
    # Models that want prompts, or have blocks that cannot be compared, have none.
    with contextlib.suppress(ValueError):
        score = diswot_score(teacher, other, pairs, shape)
        typer.echo(f"DisWOT's score, by which to compare students of this teacher: {score:.5f} (0 at best)")


@app.command()
@stage
def convert(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A published checkpoint; of taef2 the folder of its two files."),
    ],
    kind: Annotated[Literal["mdtv2", "dit", "taef2"], typer.Option("--from", help="Whose checkpoint it is.")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The model folder to write.")],
    heads: Annotated[int | None, typer.Option(help="Only for a DiT of an unpublished width.")] = None,
) -> None:
    """Turn a checkpoint of sail-sg/MDT, facebookresearch/DiT or TAEF2 into a diffusers model folder."""
    from shd_diffusion.models.convert import convert_checkpoint, convert_taef2

    if kind == "taef2":
        return convert_taef2(file, to)
    convert_checkpoint(kind, file, to, num_attention_heads=heads)


# --- training ------------------------------------------------------------------------------------------------


@app.command("train-teacher")
@stage
def train_teacher(
    config: ConfigFile,
    set_: Overrides = None,
    output: Output = None,
    dry_run: DryRun = False,
    finish: Finish = False,
) -> None:
    """Train a teacher on the denoising loss alone."""
    from shd_diffusion.config import TrainTeacherConfig

    _train(config, TrainTeacherConfig, set_, output, dry_run, finish)


@app.command()
@stage
def distill(
    config: ConfigFile,
    set_: Overrides = None,
    output: Output = None,
    dry_run: DryRun = False,
    finish: Finish = False,
) -> None:
    """Train a student from a teacher."""
    from shd_diffusion.config import DistillConfig

    _train(config, DistillConfig, set_, output, dry_run, finish)


def _train(
    config: Path, kind: Any, overrides: list[str] | None, output: Path | None, only_costs: bool, finish: bool
) -> None:
    from shd_diffusion.config import read_config
    from shd_diffusion.training.dry_run import dry_run
    from shd_diffusion.training.run import train

    parsed = read_config(config, kind, overrides or [])
    if only_costs:
        typer.echo(json.dumps(dry_run(parsed, str(config)), indent=2))
    else:
        place = _output(parsed, output, config)
        train(parsed, place, str(config), finish)
        _next("sample", place)


# --- after training ------------------------------------------------------------------------------------------


@app.command()
@stage
def sample(
    runs: Runs,
    set_: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="For the images of one run; default: its `samples/`."),
    ] = None,
    npz: Annotated[
        bool, typer.Option("--npz", help="Also write `samples.npz`, for the ADM suite's evaluator.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Text-to-image: one a line; or a .jsonl with `prompt`; or a folder of .txt.",
        ),
    ] = None,
    layout: Annotated[
        Literal["geneval", "dpg_bench"] | None,
        typer.Option(help="Sample all prompts of a benchmark, and write them as its scorer takes them."),
    ] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Sample images from finished runs into their `samples/`, or from checkpoints into `steps/STEP/samples/`."""
    from shd_diffusion.config import check_read, override_config
    from shd_diffusion.run_folder import RunFolder
    from shd_diffusion.sampling.prompts import read_prompts
    from shd_diffusion.sampling.sample_run import sample_run

    if output is not None and len(runs) > 1:
        raise UserError(
            f"--output {output}: takes the images of one run, not of {len(runs)}; sample them one by one"
        )
    for path in runs:
        run = RunFolder(path)
        if checkpoint is not None:
            from shd_diffusion.training.export_checkpoint import export_checkpoint

            run = export_checkpoint(run, checkpoint)
        config = override_config(run.read_config(), set_ or [], str(run.config_file))
        check_read(set_ or [], ("data", "prepare", "sample"), "images are sampled of a finished training")
        if prompts is not None:
            told: dict[str, Any] = {"prompts": str(prompts)}
            if not any(key.startswith("sample.num_images=") for key in set_ or []):
                told["num_images"] = len(read_prompts(prompts)) * config.sample.images_per_prompt
            config = config.model_copy(update={"sample": config.sample.model_copy(update=told)})
        sample_run(run, config, output or run.samples, npz, layout)
    of_step = [] if checkpoint is None else ["--checkpoint", checkpoint]
    _next("evaluate", *([*runs, *of_step] if output is None else [output, "--reference", "REF"]))


@app.command()
@stage
def evaluate(
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_OR_IMAGES...",
            help="Sampled runs, pipelines (folders or hub names), folders of images, or .npz files.",
        ),
    ],
    set_: Overrides = None,
    reference: Annotated[
        str | None, typer.Option(metavar="REF", help="Data set, folder, .npz or statistics.")
    ] = None,
    extractor: Annotated[
        str | None, typer.Option(metavar="NAME", help="What features are taken from.")
    ] = None,
    extractor_weights: Annotated[str | None, typer.Option(metavar="FILE", help="Its weights.")] = None,
    metrics: Annotated[str | None, typer.Option(metavar="A,B", help="E.g. fid,sfid,is,kid,prc.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", help="For one pipeline's samples and metrics; default: beside it."
        ),
    ] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Compute metrics; JSON on standard output, and for a run or pipeline also in `evaluation/metrics.json`."""
    from shd_diffusion.config import check_read, override_config
    from shd_diffusion.evaluation.evaluate_run import (
        evaluate_images,
        evaluate_pipeline,
        evaluate_run,
        is_pipeline,
    )
    from shd_diffusion.processes import processes
    from shd_diffusion.run_folder import RunFolder

    options = {"reference": reference, "extractor": extractor, "extractor_weights": extractor_weights}
    quoted = (
        f"evaluate.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value
    )
    overrides = [*(set_ or []), *quoted]
    overrides += [f"evaluate.metrics=[{metrics}]"] if metrics else []
    if output is not None and (len(targets) > 1 or not is_pipeline(str(targets[0]))):
        raise UserError(f"--output {output}: is for the samples of one pipeline; remove it")
    found = {}
    for target in targets:
        run = RunFolder(target)
        if checkpoint is not None:
            run = run.find_step(checkpoint)
        if run.config_file.exists():
            config = override_config(run.read_config(), overrides, str(run.config_file))
            check_read(
                overrides,
                ("data", "evaluate", "prepare", "teacher"),
                f"the images are there; make others by `shd-diffusion sample {shlex.quote(str(target))} --set ...`",
            )
            found[str(target)] = evaluate_run(run, config)
        elif is_pipeline(str(target)):
            found[str(target)] = evaluate_pipeline(str(target), overrides, output)
        else:
            found[str(target)] = evaluate_images(target, overrides)
    if processes().is_main_process:
        typer.echo(json.dumps(found if len(targets) > 1 else found[str(targets[0])], indent=2))
    if evaluated := [target for target in targets if RunFolder(target).config_file.exists()]:
        _next("report", *evaluated, *([] if checkpoint is None else ["--checkpoint", checkpoint]))


@app.command()
@stage
def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Runs, pipeline or model folders, hub names; first what the others are told against.",
        ),
    ],
    set_: Overrides = None,
    batch_size: Annotated[
        str, typer.Option("--batch-size", metavar="N,N", help="Samples at once; one number or several.")
    ] = "1,16",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Of the weights.")
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="NAME", help="E.g. cpu, cuda, cuda:1.")] = None,
    attention: Annotated[
        str | None, typer.Option(metavar="BACKEND", help="One of diffusers' attention backends.")
    ] = None,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the denoiser.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Turns that each model takes.")] = 10,
    image_size: Annotated[
        int | None, typer.Option(min=1, metavar="PIXELS", help="Of text-to-image; default: the first run's.")
    ] = None,
    denoiser_only: Annotated[bool, typer.Option("--denoiser-only", help="Sample no images.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="For the JSON; default: standard output.")
    ] = None,
) -> None:
    """Tell what models cost side by side: parameters, multiply-adds, time, memory; for a run also in `evaluation/`."""
    from rich.console import Console

    from shd_diffusion.benchmark.describe import tables
    from shd_diffusion.benchmark.run_benchmark import Plan, check_written
    from shd_diffusion.benchmark.run_benchmark import benchmark as run_stage
    from shd_diffusion.files import write_json

    options = {"dtype": dtype, "attention": attention, "compile": "true" if compile_ else None}
    overrides = [*(set_ or []), *(f"sample.{key}={value}" for key, value in options.items() if value)]
    if output is not None and output.is_dir():
        raise UserError(f"--output {output}: is a folder; give a file")
    if output is not None and output.exists():
        check_written(output)
    plan = Plan(
        tuple(sorted(_numbers("--batch-size", batch_size, "1,16"))),
        rounds,
        device,
        image_size,
        not denoiser_only,
    )
    found = run_stage(models, plan, overrides)
    if output is not None:
        write_json(output, found)
    else:
        typer.echo(json.dumps(found, indent=2))
    for table in tables(found):
        Console(stderr=True).print(table)


@app.command()
@stage
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="An evaluation/metrics.json.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another.")],
    anyway: Annotated[bool, typer.Option("--anyway", help="Though the protocols differ.")] = False,
) -> None:
    """Compare two evaluations, if their protocols allow it."""
    from shd_diffusion.evaluation.compare import compare_metrics
    from shd_diffusion.files import read_json

    typer.echo(json.dumps(compare_metrics(read_json(first), read_json(second), anyway), indent=2))


@app.command()
@stage
def report(
    runs: Runs,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="The page's folder, or the page itself if .html."),
    ] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Write one page that shows and compares runs."""
    from shd_diffusion.reporting import print_table, write_report
    from shd_diffusion.run_folder import RunFolder

    beside = runs[0].parent
    if checkpoint is not None:  # beside them finished runs, such as the teacher
        runs = [
            run
            if not RunFolder(run).steps.is_dir() and RunFolder(run).summary_file.exists()
            else RunFolder(run).find_step(checkpoint).path
            for run in runs
        ]
    place = output or (runs[0] if len(runs) == 1 else beside)
    page = write_report(runs, place if place.suffix == ".html" else place / "report.html")
    typer.echo(f"report: {printable(str(page))}")
    print_table(runs)


@app.command()
@stage
def squeeze(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a teacher.")],
    heads: Annotated[
        str, typer.Option(metavar="N,N", help="Student heads, e.g. 6,5; blocks are drawn at the first.")
    ],
    samples: Annotated[int, typer.Option(min=2, help="Images, each at every timestep.")] = 24,
    timesteps: Annotated[int, typer.Option(min=2, help="Evenly spaced.")] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Default: `squeezing/` in the run.")
    ] = None,
) -> None:
    """Measure what a teacher loses when its heads are squeezed, by each way to do so, without a student."""
    from rich.console import Console

    from shd_diffusion.analysis.measure import MeasurementPlan
    from shd_diffusion.analysis.measure_teacher import squeeze_teacher, table
    from shd_diffusion.run_folder import RunFolder

    counts = _numbers("--heads", heads, "6,5")
    place = output or run / "squeezing"
    plan = MeasurementPlan(samples=samples, timesteps=timesteps)
    Console().print(table(squeeze_teacher(RunFolder(run), counts, place, plan)))
    typer.echo(f"squeezing: {place / 'squeezing.json'}")


@app.command()
@stage
def compress(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="A run, a pipeline or model folder, or a hub name.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="The pipeline folder to write.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="CONFIG", help="Of a training, whose data calibrate; default: the run's."
        ),
    ] = None,
    heads: Annotated[float | None, typer.Option(help="Of every attention block; below 1 a share.")] = None,
    neurons: Annotated[float | None, typer.Option(help="Of every feed-forward; below 1 a share.")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="How many stay.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="UNIT=SHARE",
            help="Find heads, neurons and blocks for a share of the teacher's parameters, macs or latency.",
        ),
    ] = None,
    only_plan: Annotated[
        bool, typer.Option("--dry-run", help="Show what a budget leaves, loses and saves; write nothing.")
    ] = False,
    images: Annotated[int, typer.Option(min=64, help="To calibrate on.")] = 1024,
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar="WEIGHT,...",
            help="How often timesteps of each of so many equal parts count, least noise first.",
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Fewer, wider heads, in the teacher's own class.")
    ] = False,
    method: Annotated[
        Literal["merge", "drop", "magnitude", "random"],
        typer.Option(help="How heads leave; all but `merge` are baselines."),
    ] = "merge",
) -> None:
    """Make a smaller pipeline from a teacher's weights, without training; heal it by `student.pretrained`."""
    from rich.console import Console

    from shd_diffusion.compress_run import calibrate, check_output, compress_run, plan_run
    from shd_diffusion.compression.budget import parse_budget
    from shd_diffusion.compression.describe import plan_table, table
    from shd_diffusion.config import read_run_config
    from shd_diffusion.files import check_outside
    from shd_diffusion.run_folder import RunFolder

    asked = None if budget is None else parse_budget(budget)
    counts = _count(heads), _count(neurons), blocks
    given: dict[str, object] = {
        "--heads": heads,
        "--neurons": neurons,
        "--blocks": blocks,
        "--plain": plain or None,
        "--method": method if method != "merge" else None,
    }
    if asked is not None and (more := [name for name, value in given.items() if value is not None]):
        raise UserError(
            f"--budget {budget}: finds heads, neurons and blocks itself; leave {', '.join(more)} out"
        )
    if only_plan and asked is None:
        raise UserError("--dry-run: shows what a budget comes to; add one, such as --budget macs=0.5")
    if heads is neurons is blocks is budget is None:
        raise UserError(
            "nothing is to leave: give --heads, --neurons, --blocks, or a --budget such as macs=0.5"
        )
    if output is None and not only_plan:
        raise UserError("--output DIR is missing: the folder for the smaller pipeline")
    if output is not None:
        check_output(output)  # before the calibration
    run = RunFolder(Path(teacher))
    if data is None and not run.config_file.exists():
        raise UserError(
            f"{teacher}: no run, so it has no data to calibrate on; name them: --data CONFIG, the config of a training"
        )
    config = run.read_config() if data is None else read_run_config(data)
    if output is not None:
        check_outside(output, {"TEACHER": teacher, **config.reads})
    calibration = calibrate(teacher, config, images, _weights(timesteps))
    if only_plan and asked is not None:
        Console().print(plan_table(plan_run(calibration, asked)))
    elif output is not None:
        results = compress_run(calibration, output, *counts, plain, asked, method)
        Console().print(table(results))
        typer.echo(f"compressed: {output}")
        _next("sample", output)


@app.command()
@stage
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="`owner/name` on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> None:
    """Upload a run's pipeline to the hub, with its model card."""
    from shd_diffusion.hub_upload import push as upload
    from shd_diffusion.run_folder import RunFolder

    typer.echo(f"pushed: {upload(RunFolder(run), name, private)}")


@app.command()
@stage
def study(
    config: Annotated[Path, typer.Argument(metavar="STUDY", help="A YAML file, see `configs`.")],
    set_: Overrides = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="The study's folder; default: the config's."),
    ] = None,
) -> None:
    """Run what is missing of a study with paired seeds, and write up what it says."""
    from shd_diffusion.config import read_config
    from shd_diffusion.study.config import StudyConfig
    from shd_diffusion.study.run_study import run_study

    parsed = read_config(config, StudyConfig, set_ or [])
    page = run_study(parsed, output or Path(parsed.output), command_line="shd_diffusion.cli")
    typer.echo(page.with_suffix(".md").read_text(encoding="utf-8"))
    typer.echo(f"study: {page}")


def _numbers(option: str, text: str, example: str) -> list[int]:
    """Positive numbers with commas between them, each once, in their order."""
    try:
        numbers = list(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise UserError(f"{option} {text}: give one or more numbers from 1 on, such as {example}")
    return numbers


def _count(number: float | None) -> int | float | None:
    """A share below 1, a number from 1 on."""
    if number is not None and not (number < 1 or float(number).is_integer()):
        raise UserError(f"--heads, --neurons: {number} is no number of them; give a share or a whole number")
    return number if number is None or number < 1 else int(number)


def _weights(timesteps: str | None) -> list[float] | None:
    """Numbers with commas between them, none negative."""
    if timesteps is None:
        return None
    try:
        weights = [float(weight) for weight in timesteps.split(",")]
    except ValueError:
        weights = []
    if not 0 < sum(weights) < math.inf or min(weights) < 0:
        raise UserError(
            f"--timesteps {timesteps}: give a weight for each of some equal parts of the timesteps, such as 2,1,0"
        )
    return weights


def _output(config: Any, output: Path | None, source: Path) -> Path:
    if output is None and config.output is None:
        raise UserError(f"{source}: key `output` is missing; add it or give --output DIR")
    return output or Path(str(config.output))


def main() -> None:
    """Entry point of the installed command."""
    app()


if __name__ == "__main__":
    main()
