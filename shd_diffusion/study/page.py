"""A study written up: one self-contained page, its plots as PNG, and the tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from shd_diffusion.evaluation.metrics import higher_is_better
from shd_diffusion.files import write_text
from shd_diffusion.reporting.metrics_table import without_features
from shd_diffusion.reporting.page import write_page
from shd_diffusion.reporting.plot_style import plot_styles
from shd_diffusion.reporting.tables import Lines, count, duration, escape_markdown, markdown, significant
from shd_diffusion.settings_table import settings_table
from shd_diffusion.statistics import Estimate
from shd_diffusion.study.plots import study_plots
from shd_diffusion.study.results import Comparison, Results, Row


def write_study(results: Results, output: Path) -> Path:
    """Write `output` (HTML), a folder `<stem>-figures` beside it, and `<stem>.md` with the tables.

    Raises:
        UserError: see `reporting.page.write_page`.
    """
    plots, rows, comparisons = study_plots(results), row_table(results), comparison_table(results)
    environment = {"commits": ", ".join(results.commits), **results.environment["machine"]}
    content = {
        "title": results.study.title,
        "lead": lead(results),
        "styles": plot_styles(list(results.study.variants)),
        "plots": plots,
        "rows": rows,
        "comparisons": comparisons,
        "variants": [row.variant for row in results.rows],
        "compared": [comparison.variant for comparison in results.comparisons],
        "note": note(results),
        "protocol": settings_table([results.protocol]),
        "environment": settings_table([environment]),
        "config": yaml.safe_dump(results.study.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        "command": results.environment["command"],
    }
    write_page(output, "study.html", content, plots)
    title, summary, tail = map(escape_markdown, (results.study.title, lead(results), note(results)))
    tables = "\n".join(markdown(table) for table in (rows, comparisons) if len(table) > 1)
    write_text(output.with_suffix(".md"), f"# {title}\n\n{summary}\n\n{tables}\n{tail}\n")
    return output


def lead(results: Results) -> str:
    """What came out, in the last condition that has results."""
    metric, reference = results.study.metrics[0], results.study.reference
    done = f"{len(results.outcomes)} of {results.planned} runs are complete."
    if not results.rows:
        return done
    condition = results.rows[-1].condition
    rows = {row.variant: row for row in results.rows if row.condition == condition}
    pick = max if higher_is_better(metric) else min
    best = pick(rows.values(), key=lambda row: row.metrics[metric].mean)
    under = f"Under {condition}, " if condition else ""
    said = f"{under}{best.variant} has the best mean {results.heading(metric)}, {_with_interval(best.metrics[metric])}"
    if reference in rows and best.variant != reference:
        said += f"; the reference {reference} has {_with_interval(rows[reference].metrics[metric])}"
    return f"{said}. {done}"


def note(results: Results) -> str:
    """How to read the tables."""
    pairs = max((comparison.paired.difference.n for comparison in results.comparisons), default=0)
    return (
        "Means over seeds; parentheses hold 95 % intervals by Student's t. Runs of one seed share initial weights, "
        "data order, noise, and the noise of the samples, so differences are paired seed by seed. "
        "p-values are two-sided; p (Holm) is corrected over all comparisons in a metric."
    ) + (
        f" With {pairs} pairs the Wilcoxon test cannot go below p = {2 ** (1 - pairs):.3g}."
        if pairs > 1
        else ""
    )


def row_table(results: Results) -> Lines:
    """Variants by condition, headings first."""
    conditions, distance = len(results.study.conditions) > 1, without_features(results.heading("fid"))
    head = [
        *(["Condition"] * conditions), "Variant", "Seeds", *map(results.heading, results.study.compared),
        "Training", "Extra parameters", *(f"To {distance} {target:g}" for target in results.study.targets),
    ]  # fmt: skip
    return [head, *(_row(row, conditions, results.study.compared) for row in results.rows)]


def _row(row: Row, conditions: bool, metrics: Sequence[str]) -> list[str]:
    reached = [
        f"{each.steps.mean:.0f} steps, {duration(each.seconds.mean)} ({each.n} of {each.of})"
        if each.steps and each.seconds
        else f"not reached (0 of {each.of})"
        for each in row.reached.values()
    ]
    return [
        *([row.condition] * conditions), row.variant, str(len(row.seeds)),
        *(_with_interval(row.metrics[metric]) if metric in row.metrics else "–" for metric in metrics),
        duration(row.training_seconds.mean), count(row.extra_parameters), *reached,
    ]  # fmt: skip


def comparison_table(results: Results) -> Lines:
    """Paired differences from the reference, headings first."""
    conditions, metrics = len(results.study.conditions) > 1, len(results.study.compared) > 1
    head = [
        *(["Condition"] * conditions), f"Minus {results.study.reference}", *(["Metric"] * metrics), "Pairs",
        "Difference", "t-test p", "p (Holm)", "Wilcoxon p", "p (Holm)",
    ]  # fmt: skip
    return [head, *(_comparison(each, conditions, metrics, results) for each in results.comparisons)]


def _comparison(each: Comparison, conditions: bool, metrics: bool, results: Results) -> list[str]:
    return [
        *([each.condition] * conditions), each.variant, *([results.heading(each.metric)] * metrics),
        str(each.paired.difference.n), _with_interval(each.paired.difference),
        *map(_p, (each.paired.t_test, each.t_test_holm, each.paired.wilcoxon, each.wilcoxon_holm)),
    ]  # fmt: skip


def _with_interval(value: Estimate) -> str:
    if value.low is None or value.high is None:
        return significant(value.mean)
    return f"{significant(value.mean)} ({significant(value.low)} to {significant(value.high)})"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
