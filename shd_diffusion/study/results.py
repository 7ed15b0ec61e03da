"""What came out of a study: metrics of every run, means of every variant, paired comparisons."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, isclose, log
from pathlib import Path
from typing import Any

import numpy as np

from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_as, write_json, write_text
from shd_diffusion.protocol import differing, flatten
from shd_diffusion.reporting.metrics_table import frechet_title
from shd_diffusion.reporting.runs import Environment, Metrics, Result, read_entries
from shd_diffusion.reporting.tables import csv_text
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.statistics import Estimate, Paired, estimate, holm, paired
from shd_diffusion.study.config import (
    Place,
    Planned,
    StudyConfig,
    check_inputs,
    run_name,
    teacher_of,
    validation_after,
)

SAME_TEACHER = 0.01
"""So near are metrics of one training on two machines of a kind: rounding moves a Fréchet distance by 1e-5 of it, and
one image of a thousand in or out of the teacher's neighbourhood the precision by 2e-3."""


@dataclass(frozen=True, slots=True)
class ValidationPoint:
    """A Fréchet distance on few samples, after so many steps and seconds of training."""

    step: int
    seconds: float
    fid: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One complete run; `training_seconds` are those of its training steps, without the validation between them."""

    condition: str
    variant: str
    seed: int
    training_seconds: float
    parameters: int
    extra_parameters: int
    metrics: dict[str, float]
    validation: list[ValidationPoint]


@dataclass(frozen=True, slots=True)
class Reached:
    """When the validation's Fréchet distance fell to a target, over the `n` of `of` runs in which it did."""

    n: int
    of: int
    steps: Estimate | None
    seconds: Estimate | None


@dataclass(frozen=True, slots=True)
class Row:
    """One variant under one condition, over its seeds; `reached` by target."""

    condition: str
    variant: str
    seeds: list[int]
    metrics: dict[str, Estimate]
    training_seconds: Estimate
    parameters: int
    extra_parameters: int
    reached: dict[str, Reached]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A variant minus the reference in one metric, over the seeds that both have; p-values also after Holm."""

    condition: str
    variant: str
    reference: str
    metric: str
    paired: Paired
    t_test_holm: float | None
    wilcoxon_holm: float | None


@dataclass(frozen=True, slots=True)
class Results:
    """All of a study; `teacher` are its metrics where it was evaluated."""

    study: StudyConfig
    planned: int
    outcomes: list[Outcome]
    rows: list[Row]
    comparisons: list[Comparison]
    teacher: dict[str, float]
    protocol: dict[str, Any]
    commits: list[str]
    environment: dict[str, Any]

    def heading(self, metric: str) -> str:
        """What a metric is called in tables and plots: by its key, but Fréchet distances as reports call them."""
        return frechet_title(metric, self.protocol.get("features")) or metric


class Published(Result):
    """What `write_results` has written."""

    study: StudyConfig
    outcomes: list[Outcome]
    teacher: dict[str, float]
    protocol: dict[str, Any]
    commits: list[str]


@dataclass(frozen=True, slots=True)
class Known:
    """Planned runs that were made elsewhere, by place."""

    outcomes: dict[Place, Outcome]
    protocols: dict[Path, dict[str, Any]]
    commits: set[str]


def read_known(study: StudyConfig, planned: Sequence[Planned]) -> Known:
    """What came out of those planned runs that the study's `known` files hold.

    Raises:
        UserError: a file is missing or damaged or has another teacher, or a run has other overrides or lacks a metric.
            Teachers are told apart by the metrics that are compared, see `SAME_TEACHER`.
    """
    known = Known({}, {}, set())
    teacher = _teacher_metrics(study)
    for file in map(Path, study.known):
        published = read_as(file, Published)
        common = teacher.keys() & published.teacher.keys() & {*study.metrics}
        if not all(isclose(teacher[k], published.teacher[k], rel_tol=SAME_TEACHER) for k in common):
            raise UserError(
                f"{file}: its teacher has other metrics than {teacher_of(study)}, and runs of two "
                "teachers do not compare; take it out of `known`"
            )
        outcomes = {(o.condition, o.variant, o.seed): o for o in published.outcomes}
        for place in (each.place for each in planned if each.place in outcomes):
            condition, variant, _ = place
            slow = {*published.study.compared} - {*published.study.metrics}
            for lacking in {*study.compared} - {*outcomes[place].metrics} - slow:
                raise UserError(f"{file}: `{run_name(*place)}` has no `{lacking}`; take it out of `known`")
            if published.study.asked(condition, variant) != study.asked(condition, variant):
                raise UserError(
                    f"{file}: `{run_name(*place)}` was made with other overrides; take it out of `known`"
                )
            known.outcomes[place] = outcomes[place]
        known.protocols[file] = published.protocol
        known.commits.update(published.commits)
    return known


def collect(study: StudyConfig, planned: Sequence[Planned], known: Known) -> Results:
    """Read what is complete, and put it beside what is known.

    Raises:
        UserError: a metric that the study compares was not computed, a file is damaged, runs began with different
            things of one name, or those from elsewhere were measured otherwise.
    """
    check_inputs(planned)
    complete = [each for each in planned if each.place not in known.outcomes and each.is_complete]
    found = {**known.outcomes, **{each.place: read_outcome(each, study) for each in complete}}
    outcomes = [found[each.place] for each in planned if each.place in found]
    commits = {read_as(each.run.environment_file, Environment).commit for each in complete}
    files = {each.run.evaluation_file: f"`shd-diffusion evaluate {each.run.path}` anew" for each in complete}
    own = {file: read_as(file, Metrics).protocol for file in files}
    protocols = own | known.protocols
    for file, protocol in protocols.items():
        remedy = files.get(file, "take it out of `known`")
        _check_protocol(file, protocol, next(iter(protocols.items())), study.varied, remedy)
    return Results(
        study=study,
        planned=len(planned),
        outcomes=outcomes,
        rows=make_rows(study, outcomes),
        comparisons=[each for metric in study.compared for each in compare_variants(study, outcomes, metric)],
        teacher=_teacher_metrics(study),
        protocol=next(iter(protocols.values()), {}),
        commits=sorted({*filter(None, commits), *known.commits}),
        environment=describe_environment(),
    )


def _check_protocol(
    file: Path,
    protocol: Mapping[str, Any],
    first: tuple[Path, Mapping[str, Any]],
    varied: Collection[str],
    remedy: str,
) -> None:
    """See that runs were measured as the first ones were, but for what varies within the study.

    Raises:
        UserError: they were not, as far as both tell.
    """
    flat = [
        {k: v for k, v in flatten(each).items() if not {*k.split(".")} & {*varied, "seed"}}
        for each in (protocol, first[1])
    ]
    common = flat[0].keys() & flat[1].keys()
    if different := differing(*({k: v for k, v in each.items() if k in common} for each in flat)):
        raise UserError(f"{file}: measured otherwise than {first[0]} ({different[0]}); {remedy}")


def _teacher_metrics(study: StudyConfig) -> dict[str, float]:
    """Those of the teacher, once it is evaluated."""
    teacher = RunFolder(Path(teacher_of(study)))
    return read_as(teacher.evaluation_file, Metrics).values if teacher.is_evaluated() else {}


def read_outcome(planned: Planned, study: StudyConfig) -> Outcome:
    """What a complete run left behind.

    Raises:
        UserError: a metric that the study compares was not computed, or a file is damaged.
    """
    run, seconds, last = planned.run, 0.0, 0
    validation = []
    trained = planned.config.train.max_steps > 0  # a run of 0 steps logs none
    for entry in read_entries(run.metrics_file) if trained else []:
        seconds += entry.seconds_per_step * (entry.step - last)
        last = entry.step
        if entry.validation and entry.validation.fid is not None:
            validation.append(ValidationPoint(last, seconds, entry.validation.fid))
    metrics = dict(read_as(run.evaluation_file, Metrics).values)
    if study.after_seconds and trained and not validation:
        raise UserError(f"{run.metrics_file}: has no validation, which `after_seconds` needs; take it out")
    for after in study.after_seconds:
        if validation and validation[0].seconds <= after:  # a slow run has none by then
            metrics[validation_after(after)] = fid_after(validation, after)
    if lacking := [metric for metric in study.metrics if metric not in metrics]:
        raise UserError(f"{run.evaluation_file}: has no `{lacking[0]}`; take it out of `metrics`")
    summary = run.read_summary()
    return Outcome(
        condition=planned.condition,
        variant=planned.variant,
        seed=planned.seed,
        training_seconds=seconds,
        parameters=summary.parameters,
        extra_parameters=summary.extra_parameters,
        metrics=metrics,
        validation=validation,
    )


def fid_after(validation: Sequence[ValidationPoint], seconds: float) -> float:
    """The validation's distance after so many seconds, between two points on the line through their logarithms.

    A run that had ended by then keeps its last one.
    """
    times, logarithms = [each.seconds for each in validation], [log(each.fid) for each in validation]
    return exp(np.interp(seconds, times, logarithms))


def make_rows(study: StudyConfig, outcomes: Sequence[Outcome]) -> list[Row]:
    """Means over the seeds of each variant under each condition that has runs."""
    return [
        Row(
            condition=condition,
            variant=variant,
            seeds=[outcome.seed for outcome in members],
            metrics={
                metric: estimate(values)
                for metric in study.compared
                if (values := [outcome.metrics[metric] for outcome in members if metric in outcome.metrics])
            },
            training_seconds=estimate([outcome.training_seconds for outcome in members]),
            parameters=members[0].parameters,
            extra_parameters=members[0].extra_parameters,
            reached={f"fid_{target:g}": reach(members, target) for target in study.targets},
        )
        for condition in study.conditions
        for variant in study.variants
        if (members := _members(outcomes, condition, variant))
    ]


def _members(outcomes: Sequence[Outcome], condition: str, variant: str) -> list[Outcome]:
    return [each for each in outcomes if (each.condition, each.variant) == (condition, variant)]


def reach(members: Sequence[Outcome], target: float) -> Reached:
    """When the validation of each run first gave a distance of at most `target`."""
    first = [next((point for point in o.validation if point.fid <= target), None) for o in members]
    hits = [point for point in first if point is not None]
    return Reached(
        n=len(hits),
        of=len(members),
        steps=estimate([hit.step for hit in hits]) if hits else None,
        seconds=estimate([hit.seconds for hit in hits]) if hits else None,
    )


def compare_variants(study: StudyConfig, outcomes: Sequence[Outcome], metric: str) -> list[Comparison]:
    """Every variant against the reference, condition by condition; Holm's correction is over all of these."""
    pairs: dict[tuple[str, str], Paired] = {}
    for condition in study.conditions:
        measured = [o for o in outcomes if metric in o.metrics]
        reference = {o.seed: o.metrics[metric] for o in _members(measured, condition, study.reference)}
        for variant in study.variants:
            both = [o for o in _members(measured, condition, variant) if o.seed in reference]
            if variant != study.reference and both:
                values = [o.metrics[metric] for o in both]
                pairs[condition, variant] = paired(values, [reference[o.seed] for o in both])
    t_tests = holm([pair.t_test for pair in pairs.values()])
    wilcoxons = holm([pair.wilcoxon for pair in pairs.values()])
    return [
        Comparison(condition, variant, study.reference, metric, pair, t_test, wilcoxon)
        for ((condition, variant), pair), t_test, wilcoxon in zip(
            pairs.items(), t_tests, wilcoxons, strict=True
        )
    ]


def write_results(results: Results, folder: Path) -> None:
    """Write `study.json` with everything, and `runs.csv`, `results.csv` and `comparisons.csv` with dotted columns."""
    write_json(folder / "study.json", asdict(results) | {"study": results.study.model_dump(mode="json")})
    for name, items in (
        ("runs", results.outcomes),
        ("results", results.rows),
        ("comparisons", results.comparisons),
    ):
        trees = (flatten(asdict(item)).items() for item in items)
        lines = [{k: v for k, v in tree if not (v is None or isinstance(v, list))} for tree in trees]
        write_text(folder / f"{name}.csv", csv_text(lines))
