"""The report: one self-contained page, and every figure in it as a PNG beside it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from shd_diffusion.errors import UserError
from shd_diffusion.files import replacing_folder, write_text
from shd_diffusion.reporting.attention import attention_views
from shd_diffusion.reporting.classes import per_class_fid
from shd_diffusion.reporting.curves import block_divergences, loss_curves, loss_shares, watched_fid
from shd_diffusion.reporting.drawing import DARK, LIGHT, TEACHER_LOOK, Drawing, Look, student_look
from shd_diffusion.reporting.nearest import draw_neighbours, neighbourhoods
from shd_diffusion.reporting.protocol import Setting, compare, compare_protocols, protocol_warning
from shd_diffusion.reporting.quality import quality_scatters
from shd_diffusion.reporting.runs import Run, read_runs
from shd_diffusion.reporting.samples import draw_gallery, sample_gallery
from shd_diffusion.reporting.table import build_table, fid_text, fid_title


@dataclass(frozen=True, slots=True)
class Headline:
    """What was compared, and what came out."""

    title: str
    lead: str


def write_report(paths: Sequence[Path], output: Path) -> Path:
    """Write the report of one or many runs.

    Args:
        paths: run folders; parts of a run that are missing are named with the command that makes them.
        output: the HTML file. Its figures go to a folder `<stem>-figures` beside it, which is replaced.

    Returns:
        `output`.

    Raises:
        UserError: a folder is no finished run, a file in it is damaged, or see `write_page`; nothing has been written
            then.
    """
    runs = read_runs(paths)
    looks = assign_looks(runs)
    gallery = sample_gallery(runs)
    scatters = quality_scatters(runs, looks)
    losses = loss_curves(runs, looks)
    shares = loss_shares(runs)
    divergences = block_divergences(runs)
    watched = watched_fid(runs, looks)
    neighbours = draw_neighbours(runs)
    attention = attention_views(runs, looks)
    classes = per_class_fid(runs, looks)
    page = template("report.html").render(
        headline=headline(runs),
        runs=runs,
        looks=looks,
        light=LIGHT,
        dark=DARK,
        gallery=gallery,
        table=build_table(runs),
        fid_title=fid_title(runs),
        scatters=scatters,
        losses=losses,
        shares=shares,
        divergences=divergences,
        watched=watched,
        neighbourhoods=neighbourhoods(runs),
        attention=attention,
        classes=classes,
        protocol=compare_protocols(runs),
        configs=_compare_configs(runs),
        environments=compare(runs, _environment),
        commands=commands(runs),
        missing=missing(runs),
    )
    drawings = [
        *([draw_gallery(gallery)] if gallery else []), *([neighbours] if neighbours else []),
        *scatters, *losses, *shares, *divergences, *([watched] if watched else []), *([classes] if classes else []),
        *(drawing for view in attention for drawing in view.drawings),
    ]  # fmt: skip
    write_page(output, page, drawings)
    return output


def write_page(output: Path, page: str, drawings: Iterable[Drawing]) -> None:
    """Write a page and, in a folder `<stem>-figures` beside it, its drawings as PNG; both may replace earlier ones.

    Raises:
        UserError: there is such a folder without a page, so it is somebody else's.
    """
    figures = output.with_name(f"{output.stem}-figures")
    if figures.exists() and not output.exists():
        raise UserError(
            f"{figures}: would be replaced, but is of no {output.name}; move it or give another --output"
        )
    write_text(output, page)
    with replacing_folder(figures) as folder:
        for drawing in drawings:
            drawing.save(folder)


def assign_looks(runs: Sequence[Run]) -> dict[str, Look]:
    """A colour and a marker for each run; teachers are grey."""
    students = [run.name for run in runs if not run.is_teacher]
    looks = {name: student_look(number) for number, name in enumerate(students)}
    return {run.name: looks.get(run.name, TEACHER_LOOK) for run in runs}


def headline(runs: Sequence[Run]) -> Headline:
    """What was compared, and the outcome by FID where it is known."""
    teachers = [run for run in runs if run.is_teacher]
    students = [run for run in runs if not run.is_teacher]
    lead = protocol_warning(runs) or _lead(teachers, students, fid_title(runs))
    return Headline(_title(teachers, students), lead)


def _title(teachers: Sequence[Run], students: Sequence[Run]) -> str:
    squeezes = {(run.summary.get("teacher_heads"), run.summary["heads"]) for run in students}
    many = f"{len(students)} student{'s' * (len(students) > 1)}"
    if len(squeezes) == 1 and (squeeze := squeezes.pop())[0]:
        return f"{many}: {squeeze[0]} heads squeezed into {squeeze[1]}" if squeeze[0] != squeeze[1] else many
    if students:
        return many
    return f"Teacher {teachers[0].name}" if len(teachers) == 1 else f"{len(teachers)} teachers"


def _lead(teachers: Sequence[Run], students: Sequence[Run], fid: str) -> str:
    ranked = sorted((value, run.name) for run in students if (value := run.figure("fid")) is not None)
    reference = [
        f"{'the teacher' if len(teachers) == 1 else run.name} has {fid_text(value)}"
        for run in teachers
        if (value := run.figure("fid")) is not None
    ]
    if not ranked:
        return f"By {fid} {', '.join(reference)}." if reference else "Not evaluated yet."
    (best, name), *others = ranked
    first = f"{name} has the lowest {fid} of the students" if others else f"{name} has {fid}"
    first = f"{first}, {fid_text(best)}"
    rest = [*(f"{other} has {fid_text(value)}" for value, other in others), *reference]
    return f"{first}; {', '.join(rest)}." if rest else f"{first}."


def missing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """By section the commands that would make what runs lack."""

    def lacking(part: Iterable[Run], command: str) -> list[str]:
        names = " ".join(shlex.quote(str(run.path)) for run in part)
        return [f"shd-diffusion {command} {names}"] if names else []

    squeezing = [run for run in runs if run.config.get("losses", {}).get("shd", {}).get("weight")]
    return {
        "samples": lacking((run for run in runs if run.samples is None), "sample"),
        "metrics": lacking((run for run in runs if run.metrics is None), "evaluate"),
        "nearest": lacking((run for run in runs if run.metrics and run.nearest is None), "evaluate"),
        "log": [run.command for run in runs if run.log is None],
        "attention": [run.command for run in squeezing if run.attention is None],
    }


def commands(runs: Sequence[Run]) -> list[str]:
    """The commands that make all this again, in their order."""
    folders = " ".join(shlex.quote(str(run.path)) for run in runs)
    stages = [f"shd-diffusion {stage} {folders}" for stage in ("sample", "evaluate", "report")]
    return [*(run.command for run in runs), *stages]


def _compare_configs(runs: Sequence[Run]) -> list[Setting]:
    """Every config key; those differ that are not the same in all students: a teacher has other keys."""
    students = [run for run in runs if not run.is_teacher]
    differing = {setting.key for setting in compare(students, lambda run: run.config) if setting.differs}
    settings = compare(runs, lambda run: run.config)
    marked = [Setting(s.key, s.values, s.key in differing) for s in settings]
    return sorted(marked, key=lambda setting: not setting.differs)


def _environment(run: Run) -> dict[str, Any]:
    """Where a run took place; its command has a place of its own on the page."""
    return {key: value for key, value in (run.environment or {}).items() if key != "command"}


def template(name: str) -> Template:
    """A page of this folder, to be rendered."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
