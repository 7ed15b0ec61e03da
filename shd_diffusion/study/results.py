"""What came out of a study: figures of every run, means of every variant, paired comparisons."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_json, write_json, write_text
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.study.config import Planned, StudyConfig, watched_after
from shd_diffusion.study.runner import is_complete
from shd_diffusion.study.statistics import Estimate, Paired, estimate, holm, paired


@dataclass(frozen=True, slots=True)
class Watched:
    """A Fréchet distance on few samples, after so many steps and seconds of training."""

    step: int
    seconds: float
    fid: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One complete run; `seconds` are those of its training steps, without what was watched in between."""

    condition: str
    variant: str
    seed: int
    figures: dict[str, float]
    seconds: float
    parameters: int
    extra_parameters: int
    watched: list[Watched]


@dataclass(frozen=True, slots=True)
class Reached:
    """When the watched Fréchet distance fell to a target, over the `n` of `of` runs in which it did."""

    target: float
    n: int
    of: int
    steps: Estimate | None
    seconds: Estimate | None


@dataclass(frozen=True, slots=True)
class Row:
    """One variant under one condition, over its seeds."""

    condition: str
    variant: str
    seeds: list[int]
    figures: dict[str, Estimate]
    seconds: Estimate
    parameters: int
    extra_parameters: int
    reached: list[Reached]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A variant minus the reference in one figure, over the seeds that both have; p-values also after Holm."""

    condition: str
    variant: str
    reference: str
    metric: str
    paired: Paired
    t_test_holm: float | None
    wilcoxon_holm: float | None


@dataclass(frozen=True, slots=True)
class Results:
    """All of a study; `teacher` are its figures where it was evaluated."""

    study: StudyConfig
    planned: int
    outcomes: list[Outcome]
    rows: list[Row]
    comparisons: list[Comparison]
    teacher: dict[str, float]
    protocol: dict[str, Any]
    commits: list[str]
    environment: dict[str, Any]


def collect(study: StudyConfig, planned: Sequence[Planned]) -> Results:
    """Read what is complete.

    Raises:
        UserError: a figure that the study compares was not computed, or a file is damaged.
    """
    complete = [each for each in planned if is_complete(each.run)]
    outcomes = [read_outcome(each) for each in complete]
    for each, outcome in zip(complete, outcomes, strict=True):
        for seconds in study.after_seconds:
            if not outcome.watched or outcome.watched[0].seconds > seconds:
                raise UserError(
                    f"{each.run.metrics_file}: nothing was watched in {seconds:g} s; see `after_seconds`"
                )
            outcome.figures[watched_after(seconds)] = fid_after(outcome.watched, seconds)
        if missing := [metric for metric in study.metrics if metric not in outcome.figures]:
            raise UserError(f"{each.run.evaluation_file}: has no `{missing[0]}`; take it out of `metrics`")
    teacher = RunFolder(Path(planned[0].config.teacher.path)).evaluation_file
    commits = {read_json(each.run.path / "environment.json")["commit"] for each in complete}
    return Results(
        study=study,
        planned=len(planned),
        outcomes=outcomes,
        rows=[
            _row(members, study)
            for condition in study.conditions
            for variant in study.variants
            if (members := [o for o in outcomes if (o.condition, o.variant) == (condition, variant)])
        ],
        comparisons=[each for metric in study.compared for each in compare_variants(study, outcomes, metric)],
        teacher=_figures(read_json(teacher)) if teacher.exists() else {},
        protocol=read_json(complete[0].run.evaluation_file)["protocol"] if complete else {},
        commits=sorted(filter(None, commits)),
        environment=describe_environment(),
    )


def read_outcome(planned: Planned) -> Outcome:
    """What a complete run left behind."""
    summary, seconds, last = planned.run.read_summary(), 0.0, 0
    watched = []
    for line in planned.run.metrics_file.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if "skipped" in entry:  # its time is in the next entry's
            continue
        seconds += entry["seconds_per_step"] * (entry["step"] - last)
        last = entry["step"]
        if "watch" in entry:
            watched.append(Watched(last, seconds, entry["watch"]["fid"]))
    return Outcome(
        condition=planned.condition,
        variant=planned.variant,
        seed=planned.seed,
        figures=_figures(read_json(planned.run.evaluation_file)),
        seconds=seconds,
        parameters=summary["parameters"],
        extra_parameters=summary.get("extra_parameters", 0),
        watched=watched,
    )


def fid_after(watched: Sequence[Watched], seconds: float) -> float:
    """The watched distance after so many seconds, between two looks on the line through their logarithms.

    A run that had ended by then keeps its last one.
    """
    times, logarithms = [each.seconds for each in watched], [math.log(each.fid) for each in watched]
    return math.exp(np.interp(seconds, times, logarithms))


def _figures(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}


def _row(members: Sequence[Outcome], study: StudyConfig) -> Row:
    first = members[0]
    return Row(
        condition=first.condition,
        variant=first.variant,
        seeds=[outcome.seed for outcome in members],
        figures={m: estimate([outcome.figures[m] for outcome in members]) for m in study.compared},
        seconds=estimate([outcome.seconds for outcome in members]),
        parameters=first.parameters,
        extra_parameters=first.extra_parameters,
        reached=[reach(members, target) for target in study.targets],
    )


def reach(members: Sequence[Outcome], target: float) -> Reached:
    """When each run first watched a distance of at most `target`."""
    first = [next((w for w in outcome.watched if w.fid <= target), None) for outcome in members]
    hits = [watched for watched in first if watched is not None]
    return Reached(
        target=target,
        n=len(hits),
        of=len(members),
        steps=estimate([hit.step for hit in hits]) if hits else None,
        seconds=estimate([hit.seconds for hit in hits]) if hits else None,
    )


def compare_variants(study: StudyConfig, outcomes: Sequence[Outcome], metric: str) -> list[Comparison]:
    """Every variant against the reference, condition by condition; Holm's correction is over all of these."""
    found: list[tuple[str, str, Paired]] = []
    for condition in study.conditions:
        values = {
            name: {
                o.seed: o.figures[metric] for o in outcomes if (o.condition, o.variant) == (condition, name)
            }
            for name in study.variants
        }
        reference = values[study.reference]
        for name, own in values.items():
            seeds = [seed for seed in own if seed in reference]
            if name != study.reference and seeds:
                pair = paired([own[seed] for seed in seeds], [reference[seed] for seed in seeds])
                found.append((condition, name, pair))
    t_tests = holm([pair.t_test for *_, pair in found])
    wilcoxons = holm([pair.wilcoxon for *_, pair in found])
    return [
        Comparison(condition, name, study.reference, metric, pair, t, w)
        for (condition, name, pair), t, w in zip(found, t_tests, wilcoxons, strict=True)
    ]


# --- files ---------------------------------------------------------------------------------------------------


def write_results(results: Results, folder: Path) -> None:
    """Write `study.json` with everything, and `runs.csv`, `results.csv` and `comparisons.csv`."""
    tree = asdict(results) | {"study": results.study.model_dump(mode="json")}
    write_json(folder / "study.json", tree)
    write_text(folder / "runs.csv", _csv(results.outcomes, _run_line))
    write_text(folder / "results.csv", _csv(results.rows, _row_line))
    write_text(folder / "comparisons.csv", _csv(results.comparisons, _comparison_line))


def _run_line(outcome: Outcome) -> dict[str, Any]:
    line = {"condition": outcome.condition, "variant": outcome.variant, "seed": outcome.seed}
    return line | {"training_seconds": outcome.seconds} | outcome.figures


def _row_line(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {"condition": row.condition, "variant": row.variant, "seeds": len(row.seeds)}
    for metric, value in row.figures.items():
        line |= {metric: value.mean, f"{metric}_low": value.low, f"{metric}_high": value.high}
    line |= {"training_seconds": row.seconds.mean, "parameters": row.parameters}
    line |= {"extra_parameters": row.extra_parameters}
    for reached in row.reached:
        name = f"to_fid_{reached.target:g}"
        line |= {
            f"steps_{name}": reached.steps and reached.steps.mean,
            f"seconds_{name}": reached.seconds and reached.seconds.mean,
            f"runs_{name}": reached.n,
        }
    return line


def _comparison_line(comparison: Comparison) -> dict[str, Any]:
    pair = comparison.paired
    return {
        "condition": comparison.condition,
        "variant": comparison.variant,
        "reference": comparison.reference,
        "metric": comparison.metric,
        "pairs": pair.difference.n,
        "difference": pair.difference.mean,
        "low": pair.difference.low,
        "high": pair.difference.high,
        "t_test": pair.t_test,
        "t_test_holm": comparison.t_test_holm,
        "wilcoxon": pair.wilcoxon,
        "wilcoxon_holm": comparison.wilcoxon_holm,
    }


def _csv(items: Sequence[Any], line: Callable[[Any], dict[str, Any]]) -> str:
    lines = [line(item) for item in items]
    columns = dict.fromkeys(key for each in lines for key in each)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
