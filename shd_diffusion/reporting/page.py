"""The report: one self-contained page, and every plot in it as a PNG beside it."""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shd_diffusion.config import paths_read
from shd_diffusion.errors import UserError, printable_path
from shd_diffusion.files import check_outside, replacing_folder, write_text
from shd_diffusion.progress import announce, printable
from shd_diffusion.protocol import flatten
from shd_diffusion.reporting.attention import attention_views
from shd_diffusion.reporting.compression import compression_plots, compression_rows
from shd_diffusion.reporting.cost import cost_lines, cost_note, saving, unequal_lengths
from shd_diffusion.reporting.metrics_table import (
    against_teacher_table,
    headline,
    metrics_table,
    short_title_of,
    text_of,
    title_of,
)
from shd_diffusion.reporting.neighbour_page import neighbour_plots, neighbourhoods
from shd_diffusion.reporting.pictures import is_plot
from shd_diffusion.reporting.plot_style import DARK, LIGHT, TEACHER_STYLE, Plot, Styles, plot_styles
from shd_diffusion.reporting.quality_plots import per_class_fid, quality_scatters
from shd_diffusion.reporting.runs import Run, read_runs
from shd_diffusion.reporting.samples import sample_galleries
from shd_diffusion.reporting.training_plots import loss_curves, loss_shares, shd_by_block, validation_fid
from shd_diffusion.settings_table import Setting, settings_table

GENERATOR = '<meta name="generator" content="shd-diffusion">'
"""Tells our pages, which may be replaced, from all others."""


def write_report(paths: Sequence[Path], output: Path) -> Path:
    """Write the report of one or many runs.

    Args:
        paths: run folders; parts of a run that are missing are named with the command that makes them, and those of an
            earlier state of the run count as missing, with a line on standard error.
        output: the HTML file. Its plots go to a folder `<stem>-figures` beside it, which is replaced.

    Returns:
        `output`.

    Raises:
        UserError: a folder is no finished run, a file in it is damaged, the page would lie among what a run reads, or
            see `write_page`; nothing has been written then.
    """
    runs = read_runs(paths)
    _check_place(output)  # before the plots take their time
    for run in runs:
        check_outside(output, paths_read(run.config))
    outdated = [run.outdated for run in runs if run.outdated]
    for line in outdated:
        announce(line)
    styles = run_styles(runs)
    galleries, neighbours, attention = (
        sample_galleries(runs),
        neighbourhoods(runs),
        attention_views(runs, styles),
    )
    plots = {
        "quality": [*quality_scatters(runs, styles), *per_class_fid(runs, styles)],
        "losses": [*loss_curves(runs, styles), *validation_fid(runs, styles)],
        "shares": loss_shares(runs),
        "divergences": shd_by_block(runs),
        "compression": compression_plots(runs, styles),
    }
    beside = [*(gallery.plot() for gallery in galleries), *neighbour_plots(neighbours)]
    beside += [plot for view in attention for plot in view.plots]
    content = {
        "title": title(runs),
        "lead": lead(runs),
        "runs": runs,
        "styles": styles,
        "galleries": galleries,
        "table": metrics_table(runs),
        "against_teacher": against_teacher_table(runs),
        "cost": cost_lines(runs),
        "cost_note": cost_note(runs),
        "unequal": unequal_lengths(runs),
        "warnings": [*outdated, *warnings(runs)],
        "memory": next((run.benchmark.benchmark.get("memory") for run in runs if run.benchmark), None),
        "outcomes": outcomes(runs),
        "plots": plots,
        "neighbourhoods": neighbours,
        "attention": attention,
        "compressed": [run for run in runs if run.compression],
        "compression": compression_rows(runs),
        "protocol": settings_table([run.metrics.protocol if run.metrics else None for run in runs]),
        "configs": _compare_configs(runs),
        "environments": settings_table([_environment(run) for run in runs]),
        "commands": commands(runs),
        "missing": missing(runs),
    }
    everything = [*beside, *(plot for group in plots.values() for plot in group)]
    write_page(output, "report.html", content, everything)
    return output


def write_page(output: Path, template: str, content: Mapping[str, Any], plots: Iterable[Plot]) -> None:
    """Render a template of this folder, and write its plots as PNG to a folder `<stem>-figures` beside it.

    Both may replace earlier ones.

    Raises:
        UserError: what is there is not of an earlier page, or cannot be replaced.
    """
    folder = _check_place(output)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template).render(content, light=LIGHT, dark=DARK)
    # paths may hold control characters, and bytes that are no text
    page = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda found: printable(found[0]), page)
    try:
        for left in output.parent.glob(f".{glob.escape(output.name)}.tmp-*"):  # of a call that was killed
            left.unlink(missing_ok=True)
        write_text(output, page)
        with replacing_folder(folder) as figures:
            for plot in plots:
                names = chain([plot.name], (f"{plot.name}-{number}" for number in count(2)))
                files = (figures / f"{name}.png" for name in names)  # runs `a+b` and `a-b` have one name
                next(file for file in files if not file.exists()).write_bytes(plot.png)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another --output") from None


def _check_place(output: Path) -> Path:
    """The folder of the page's plots; an error where it or the page would replace somebody else's."""
    folder = output.with_name(f"{output.stem}-figures")
    if output.exists() and not _is_report(output):
        raise UserError(
            f"{output}: would be replaced, but is no page of shd-diffusion; give another --output"
        )
    if folder.exists() and not output.exists():
        raise UserError(
            f"{folder}: would be replaced, but is of no {output.name}; move it or give another --output"
        )
    for file in folder.iterdir() if folder.exists() else ():
        if not is_plot(file):
            raise UserError(f"{printable_path(file)}: would be deleted with earlier plots; move it elsewhere")
    return folder


def _is_report(page: Path) -> bool:
    try:
        with page.open(encoding="utf-8") as file:
            return GENERATOR in file.read(4096)
    except (OSError, UnicodeDecodeError):
        return False


def run_styles(runs: Sequence[Run]) -> Styles:
    """A colour and a marker for each run; teachers are grey."""
    students = plot_styles([run.name for run in runs if not run.is_teacher])
    return {run.name: students.get(run.name, TEACHER_STYLE) for run in runs}


def title(runs: Sequence[Run]) -> str:
    """What was compared."""
    teachers, students = _by_role(runs)
    if not students:
        return f"Teacher {teachers[0].name}" if len(teachers) == 1 else f"{len(teachers)} teachers"
    many = f"{len(students)} student{'s' * (len(students) > 1)}"
    squeezes = {(run.summary.teacher_heads, run.summary.heads) for run in students}
    before, after = squeezes.pop()
    if squeezes or before is None or before == after:
        return many
    return f"{many}: {before} heads squeezed into {after}"


def lead(runs: Sequence[Run]) -> str:
    """The outcome by FID where it is known, else by the first metric that is; and what the best student saves."""
    if warning := metrics_table(runs).warning:
        return warning
    outcome, best = _outcome(runs)
    saved = None if best is None else saving(best, runs)
    return outcome if saved is None or best is None else f"{outcome} {best.name} {saved}."


def _outcome(runs: Sequence[Run]) -> tuple[str, Run | None]:
    """The outcome, and the best student."""
    by_name = {run.name: run for run in runs}
    students_only = [run for run in runs if not run.is_teacher]
    alone = students_only[0] if len(students_only) == 1 else None
    metric = headline(runs)
    if metric is None:
        return "Not evaluated yet.", alone
    teachers, students = _by_role(runs)
    title = title_of(metric, runs)
    order = -1 if metric.better == "higher" else 1
    ranked = sorted(
        (order * value, run.name) for run in students if (value := run.metric(metric.key)) is not None
    )
    reference = [
        f"{'the teacher' if len(teachers) == 1 else run.name} has {text_of(metric, value)}"
        for run in teachers
        if (value := run.metric(metric.key)) is not None
    ]
    if not ranked:
        return f"By {title} {', '.join(reference)}.", alone
    (best, name), *others = ranked
    extreme = "highest" if metric.better == "higher" else "lowest"
    first = f"{name} has the {extreme} {title} of the students" if others else f"{name} has {title}"
    rest = [*(f"{other} has {text_of(metric, order * value)}" for value, other in others), *reference]
    outcome = f"{first}, {text_of(metric, order * best)}" + (f"; {', '.join(rest)}." if rest else ".")
    return outcome, by_name[name]


def warnings(runs: Sequence[Run]) -> list[str]:
    """What evaluations warn of, once each, with the runs whose it is where it is not of all."""
    evaluated = [(run.name, run.metrics.warnings) for run in runs if run.metrics]
    found = dict.fromkeys(warning for _, each in evaluated for warning in each)
    whose = {warning: [name for name, each in evaluated if warning in each] for warning in found}
    alone = len(evaluated) == 1
    return [
        warning if len(names) == len(evaluated) and not alone else f"{', '.join(names)}: {warning}"
        for warning, names in whose.items()
    ]


def outcomes(runs: Sequence[Run]) -> dict[str, str]:
    """By run what stands below its name in a gallery: its heads, and the metric that runs are ranked by."""
    metric = headline(runs)

    def outcome(run: Run) -> str:
        value = None if metric is None else run.metric(metric.key)
        heads = f"{run.summary.heads} heads"
        return (
            heads
            if metric is None or value is None
            else f"{heads}, {short_title_of(metric, runs)} {text_of(metric, value)}"
        )

    return {run.name: outcome(run) for run in runs}


def _by_role(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Teachers and students."""
    return [run for run in runs if run.is_teacher], [run for run in runs if not run.is_teacher]


def missing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """By section the commands that would make what runs lack."""

    def lacking(part: list[Run], command: str) -> list[str]:
        return [f"shd-diffusion {command} {_folders(part)}"] if part else []

    squeezing = [run for run in runs if flatten(run.config).get("losses.shd.weight")]
    return {
        "samples": lacking([run for run in runs if run.samples is None], "sample"),
        "metrics": lacking([run for run in runs if run.metrics is None], "evaluate"),
        "benchmark": lacking(list(runs), "benchmark") if any(run.benchmark is None for run in runs) else [],
        "nearest": lacking([run for run in runs if run.metrics and run.nearest is None], "evaluate"),
        "log": [run.command for run in runs if run.log is None and run.compression is None],
        "attention": [run.command for run in squeezing if run.attention is None],
    }


def commands(runs: Sequence[Run]) -> list[str]:
    """The commands that make all this again, in their order."""
    stages = ["sample", "evaluate", *(["benchmark"] if any(run.benchmark for run in runs) else []), "report"]
    return [*(run.command for run in runs), *(f"shd-diffusion {stage} {_folders(runs)}" for stage in stages)]


def _folders(runs: Sequence[Run]) -> str:
    return " ".join(shlex.quote(str(run.path)) for run in runs)


def _compare_configs(runs: Sequence[Run]) -> list[Setting]:
    """Every config key; those differ that are not the same in all students: a teacher has other keys."""
    students = [run.config for run in runs if not run.is_teacher]
    differing = {setting.key for setting in settings_table(students) if setting.differs}
    marked = [Setting(s.key, s.values, s.key in differing) for s in settings_table([r.config for r in runs])]
    return sorted(marked, key=lambda setting: not setting.differs)


def _environment(run: Run) -> dict[str, Any]:
    """Where a run took place, and when it went on; its command has a place of its own on the page."""
    if run.environment is None:
        return {}
    resumed = [each.started for each in run.environment.resumed]
    return run.environment.model_dump(exclude={"command", "resumed"}) | (
        {"resumed": resumed} if resumed else {}
    )
