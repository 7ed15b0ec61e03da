"""What is read from runs, compared, and written, on made-up outcomes."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from commands import DISTILL_CONFIG
from random_runs import write_summary

from shd_diffusion.config import DistillConfig, read_config
from shd_diffusion.errors import UserError
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.study.config import Planned, StudyConfig
from shd_diffusion.study.page import comparison_table, row_table, write_study
from shd_diffusion.study.plots import study_plots
from shd_diffusion.study.results import (
    Outcome,
    Results,
    ValidationPoint,
    collect,
    compare_variants,
    fid_after,
    make_rows,
    reach,
    read_known,
    read_outcome,
    write_results,
)

TREE = {
    "title": "A question",
    "distill": "configs/digits/distill.yaml",
    "output": "runs/studies/x",
    "variants": {"kd": {}, "shd": {}, "mean": {}},
    "conditions": {"short": {}, "long": {}},
    "reference": "kd",
    "seeds": [0, 1, 2],
    "targets": [100.0],
}
FIDS = {
    ("short", "kd"): [400.0, 380.0, 410.0],
    ("short", "shd"): [100.0, 120.0, 90.0],
    ("short", "mean"): [110.0, 115.0],
    ("long", "kd"): [20.0, 24.0, 22.0],
    ("long", "shd"): [21.0, 24.0, 23.0],
}


@pytest.fixture
def study() -> StudyConfig:
    return StudyConfig.model_validate(TREE)


@pytest.fixture
def outcomes() -> list[Outcome]:
    return [
        Outcome(
            condition, variant, seed, 60.0 + seed, 1000, 50 if variant == "shd" else 0, {"fid": fid},
            [ValidationPoint(step, step / 10, fid + 300 - step) for step in (100, 200, 300)],
        )
        for (condition, variant), fids in FIDS.items()
        for seed, fid in enumerate(fids)
    ]  # fmt: skip


@pytest.fixture
def results(study: StudyConfig, outcomes: list[Outcome]) -> Results:
    return Results(
        study=study, planned=18, outcomes=outcomes, rows=make_rows(study, outcomes),
        comparisons=compare_variants(study, outcomes, "fid"), teacher={"fid": 10.0},
        protocol={"features": "digits-classifier"}, commits=["abc"],
        environment={"machine": {"cores": 2}, "command": "shd-diffusion study x"},
    )  # fmt: skip


def test_only_pairs_of_a_seed_and_condition_are_compared(results: Results) -> None:
    found = {(c.condition, c.variant): c for c in results.comparisons}
    assert set(found) == {("short", "shd"), ("short", "mean"), ("long", "shd")}
    assert found["short", "shd"].paired.difference.mean == pytest.approx((-300 - 260 - 320) / 3)
    assert found["short", "mean"].paired.difference.n == 2  # the third seed is not there yet
    assert found["long", "shd"].paired.difference.mean == pytest.approx(2 / 3)
    least = min(c.paired.t_test for c in results.comparisons if c.paired.t_test is not None)
    assert min(c.t_test_holm for c in results.comparisons if c.t_test_holm) == pytest.approx(3 * least)


def test_when_a_target_is_reached(outcomes: list[Outcome]) -> None:
    members = [
        o for o in outcomes if (o.condition, o.variant) == ("short", "shd")
    ]  # 100, 120, 90 at step 300
    reached = reach(members, 100.0)
    assert (reached.n, reached.of) == (2, 3)
    assert reached.steps is not None and reached.steps.mean == 300
    assert reached.seconds is not None and reached.seconds.mean == 30
    assert reach(members, 1.0).steps is None


def test_files(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path)
    tree = json.loads((tmp_path / "study.json").read_text())
    assert tree["rows"][0]["metrics"]["fid"]["mean"] == pytest.approx(1190 / 3)
    assert tree["study"]["seeds"] == [0, 1, 2] and tree["commits"] == ["abc"]
    lines = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [line["variant"] for line in lines] == ["kd", "shd", "mean", "kd", "shd"]
    assert lines[1]["extra_parameters"] == "50" and lines[1]["reached.fid_100.n"] == "2"
    assert len(list(csv.DictReader((tmp_path / "runs.csv").open()))) == 14


def test_the_page_says_what_came_out(results: Results, tmp_path: Path) -> None:
    page = write_study(results, tmp_path / "study.html").read_text()
    assert (
        "Under long, kd has the best mean FID (digits-classifier), 22.0" in page and "14 of 18 runs" in page
    )
    assert page.count("<svg") == len(list((tmp_path / "study-figures").glob("*.png"))) == 9
    assert "http" not in page.replace("http://www.w3.org", "")
    tables = (tmp_path / "study.md").read_text()
    assert "| short | shd | 3 | 103 (65.4 to 141) | 61 s | 50 | 300 steps, 30 s (2 of 3) |" in tables


def test_a_frechet_distance_is_named_for_its_features(results: Results, tmp_path: Path) -> None:
    study = results.study.model_copy(update={"metrics": ["fid", "fid_infinity", "kid_mean"]})
    lite = replace(results, study=study, protocol={"features": "efficientnet-lite0"})
    assert row_table(lite)[0] == [
        "Condition", "Variant", "Seeds", "FD (EfficientNet-Lite0)", "FD∞ (EfficientNet-Lite0)", "kid_mean",
        "Training", "Extra parameters", "To FD 100",
    ]  # fmt: skip
    assert comparison_table(lite)[1][2] == "FD (EfficientNet-Lite0)"
    lite = replace(lite, study=results.study)
    page = write_study(lite, tmp_path / "study.html").read_text()
    assert "FD (EfficientNet-Lite0), validation, long" in page and "FID" not in page
    write_results(lite, tmp_path)
    assert "fid" in json.loads((tmp_path / "study.json").read_text())["rows"][0]["metrics"]


@pytest.mark.parametrize("names", [("a+b", "a-b"), ("α", "β")])
def test_plots_of_all_conditions_are_kept(names: tuple[str, str], results: Results, tmp_path: Path) -> None:
    """Whatever letters a name has, and where two make one file name."""
    renamed = dict(zip(("short", "long"), names, strict=True))
    study = results.study.model_copy(update={"conditions": {name: {} for name in names}})
    outcomes = [replace(o, condition=renamed[o.condition]) for o in results.outcomes]
    compared = compare_variants(study, outcomes, "fid")
    other = replace(
        results, study=study, outcomes=outcomes, rows=make_rows(study, outcomes), comparisons=compared
    )
    page = write_study(other, tmp_path / "study.html").read_text()
    assert page.count("<svg") == len(list((tmp_path / "study-figures").glob("*.png"))) == 9
    found = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(found) == len({*found})


def test_many_variants_are_lined_up_with_what_they_cost(results: Results, tmp_path: Path) -> None:
    """From the best of the first condition on; curves are of the best and of the reference alone."""
    others = {
        f"other-{fid}": Outcome("long", f"other-{fid}", 0, 92.0, 1000, 2000, {"fid": fid}, [])
        for fid in (30, 9)
    }
    kept = [
        replace(o, variant="shd-2", training_seconds=122.0) for o in results.outcomes if o.variant == "shd"
    ]
    many = [*results.outcomes, *kept, *others.values()]
    names = [*results.study.variants, *others, *"abcd", "shd-2"]
    study = results.study.model_copy(update={"variants": {name: {} for name in names}})
    wide = replace(results, study=study, outcomes=many, rows=make_rows(study, many))
    assert study_plots(results)[0].name == "fid-over-conditions"
    first, *_ = plots = study_plots(wide)
    assert first.name == "fid-standings" and "fid-over-conditions" not in {plot.name for plot in plots}
    drawn = re.findall(r">([^<>]+)</text>", first.svg)
    assert [text for text in drawn if text in wide.study.variants] == [
        "shd",
        "shd-2",
        "mean",
        "kd",
        "other-30",
        "other-9",
    ]
    assert {"×1.00, 50 extra", "×2.00, 50 extra", "×1.51, 2 k extra"} <= {*drawn}


def test_the_scale_shows_a_teacher_that_is_far_better(results: Results) -> None:
    for teacher, shown in ((2.0, True), (20.0, False)):
        plots = {plot.name: plot for plot in study_plots(replace(results, teacher={"fid": teacher}))}
        ticks = re.findall(r">([^<>]+)</text>", plots["fid-long"].svg)
        assert ("2" in ticks) == shown


def test_the_title_is_text_in_markdown(results: Results, tmp_path: Path) -> None:
    title = "# <script>\n| *a*"
    changed = replace(results, study=results.study.model_copy(update={"title": title}))
    write_study(changed, tmp_path / "study.html")
    first, *_ = (tmp_path / "study.md").read_text().splitlines()
    assert first == r"# \# &lt;script>\\n\| \*a\*"


def test_a_damaged_run_is_named(study: StudyConfig, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    planned = Planned("", "kd", 0, run, read_config(DISTILL_CONFIG, DistillConfig), ())
    run.evaluation_file.parent.mkdir()
    for log, metrics, summary, says in (
        ("{}\n{}\n", "{}", "{}", "metrics.jsonl: line 1 is not a logged step"),
        ("", "[1]", "{}", "metrics.json: Input should be"),
        ("", '{"fid": null}', "{}", "metrics.json: has no `fid`"),
        ("", '{"fid": 1}', "[]", "summary.json: Input should be"),
    ):
        run.metrics_file.write_text(log)
        run.evaluation_file.write_text(metrics)
        run.summary_file.write_text(summary)
        with pytest.raises(UserError, match=says):
            read_outcome(planned, study)


def test_steps_that_were_left_out_count_as_time(study: StudyConfig, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    lines = [
        {"step": 10, "seconds_per_step": 2.0},
        {"step": 11, "skipped": ["denoise"]},
        {"step": 20, "seconds_per_step": 3.0, "validation": {"fid": 7.0}},
    ]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_summary(run.path, "distill", 20)
    run.evaluation_file.parent.mkdir()
    run.evaluation_file.write_text('{"fid": 6.0}')
    config = read_config(DISTILL_CONFIG, DistillConfig)
    outcome = read_outcome(Planned("", "kd", 0, run, config, ()), study)
    assert outcome.training_seconds == 10 * 2 + 10 * 3 and outcome.validation == [
        ValidationPoint(20, 50.0, 7.0)
    ]


def test_a_run_of_no_steps_takes_no_time(study: StudyConfig, tmp_path: Path) -> None:
    """Such as the mean of several students' weights, which is sampled as it is and logs nothing."""
    run = RunFolder(tmp_path)
    write_summary(run.path, "distill", 0)
    run.evaluation_file.parent.mkdir()
    run.evaluation_file.write_text('{"fid": 6.0}')
    config = read_config(DISTILL_CONFIG, DistillConfig, ["train.max_steps=0"])
    outcome = read_outcome(Planned("", "average", 0, run, config, ()), study)
    assert (outcome.training_seconds, outcome.metrics, outcome.validation) == (0, {"fid": 6.0}, [])


def test_the_distance_after_equal_seconds(study: StudyConfig) -> None:
    points = [
        ValidationPoint(100, 10.0, 400.0),
        ValidationPoint(200, 20.0, 100.0),
        ValidationPoint(300, 30.0, 50.0),
    ]
    found = [fid_after(points, seconds) for seconds in (10, 15, 20, 25, 99)]
    # geometric means half way; then it had ended
    assert found == pytest.approx([400, 200, 100, 50 * 2**0.5, 50])
    assert study.model_copy(update={"after_seconds": [2.5]}).compared == ["fid", "validation_fid_after_2.5_s"]


def test_a_run_too_slow_for_a_time_is_left_out_there(results: Results, tmp_path: Path) -> None:
    study = results.study.model_copy(update={"after_seconds": [5.0]})
    after = "validation_fid_after_5_s"
    timed = [
        o
        if o.variant == "mean" or o.seed == 0
        else replace(o, metrics={**o.metrics, after: 2 * o.metrics["fid"]})
        for o in results.outcomes
    ]
    rows = {(row.condition, row.variant): row for row in make_rows(study, timed)}
    assert rows["short", "kd"].metrics[after].n == 2 and rows["short", "kd"].metrics["fid"].n == 3
    assert after not in rows["short", "mean"].metrics
    compared = {(c.condition, c.variant): c for c in compare_variants(study, timed, after)}
    assert set(compared) == {("short", "shd"), ("long", "shd")}
    assert compared["short", "shd"].paired.difference.mean == pytest.approx(2 * (-260 - 320) / 2)
    written = replace(results, study=study, outcomes=timed, rows=list(rows.values()))
    write_study(written, tmp_path / "study.html")
    assert "| short | mean | 2 | 112 (80.7 to 144) | – |" in (tmp_path / "study.md").read_text()
    write_results(written, tmp_path)
    config = read_config(DISTILL_CONFIG, DistillConfig, [f"teacher.path={tmp_path / 'teacher'}"])
    run = Planned("short", "mean", 0, RunFolder(tmp_path / "none"), config, ())
    known = {"known": [str(tmp_path / "study.json")]}
    assert read_known(study.model_copy(update=known), [run]).outcomes  # asked for there, and too slow
    with pytest.raises(UserError, match="`short mean seed 0` has no `validation_fid_after_9_s`"):
        read_known(study.model_copy(update={**known, "after_seconds": [9.0]}), [run])


@pytest.fixture
def planned(study: StudyConfig, tmp_path: Path) -> list[Planned]:
    """All runs of the study, none of which is made here."""
    config = read_config(DISTILL_CONFIG, DistillConfig, [f"teacher.path={tmp_path / 'teacher'}"])
    places = [(c, v, seed) for seed in study.seeds for c in study.conditions for v in study.variants]
    return [Planned(*place, RunFolder(tmp_path / "none"), config, ()) for place in places]


@pytest.fixture
def elsewhere(results: Results, tmp_path: Path) -> Path:
    """The study's results, as written on another machine."""
    write_results(results, tmp_path / "elsewhere")
    return tmp_path / "elsewhere" / "study.json"


@pytest.fixture(autouse=True)
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have one of their own where the configs say."""
    monkeypatch.setattr("shd_diffusion.study.results.teacher_of", lambda study: str(tmp_path / "teacher"))


def evaluate_teacher(folder: Path, fid: float) -> None:
    (folder / "teacher" / "evaluation").mkdir(parents=True)
    write_summary(folder / "teacher", "train-teacher", 20)
    RunFolder(folder / "teacher").evaluation_file.write_text(json.dumps({"fid": fid}))


def test_runs_that_were_made_elsewhere_count(
    results: Results,
    planned: list[Planned],
    elsewhere: Path,
    tmp_path: Path,
) -> None:
    """The same outcomes and comparisons as there, of those that the study plans."""
    evaluate_teacher(tmp_path, 10.0)
    study = results.study.model_copy(update={"known": [str(elsewhere)]})
    found = collect(study, planned, read_known(study, planned))
    assert sorted(map(repr, found.outcomes)) == sorted(map(repr, results.outcomes))
    assert found.comparisons == results.comparisons and found.teacher == results.teacher
    assert found.commits == ["abc"] and found.protocol == results.protocol
    some = [each for each in planned if each.condition == "short"]
    assert len(collect(study, some, read_known(study, some)).outcomes) == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"variants": {"kd": {}, "shd": {"losses.shd.weight": 1}, "mean": {}}},
            "`short shd seed 0` was made with other",
        ),
        ({"metrics": ["kid_mean"]}, "`short kd seed 0` has no `kid_mean`"),
        ({"distill": "configs/emoji/distill.yaml"}, "`short kd seed 0` was made with other"),
    ],
)
def test_other_runs_from_elsewhere_do_not_count(
    change: dict[str, object], says: str, study: StudyConfig, planned: list[Planned], elsewhere: Path
) -> None:
    other = StudyConfig.model_validate({**TREE, **change, "known": [str(elsewhere)]})
    with pytest.raises(UserError, match=f"{elsewhere}: {says}"):
        read_known(other, planned)


def test_models_of_one_name_made_otherwise_do_not_count(
    outcomes: list[Outcome], planned: list[Planned], tmp_path: Path
) -> None:
    tree = {**TREE, "variants": {**TREE["variants"], "kd": {"student.pretrained": "small"}}}
    there, here = (
        StudyConfig.model_validate({**tree, "compressed": {"small": {"heads": heads}}}) for heads in (4, 2)
    )
    written = Results(there, 18, outcomes, [], [], {}, {}, [], {})
    write_results(written, tmp_path / "there")
    known = {"known": [str(tmp_path / "there" / "study.json")]}
    assert len(read_known(there.model_copy(update=known), planned).outcomes) == len(outcomes)
    with pytest.raises(UserError, match="`short kd seed 0` was made with other"):
        read_known(here.model_copy(update=known), planned)


@pytest.mark.parametrize(
    ("varied", "protocol", "says"),
    [
        (
            {},
            {"num_images": 50_000, "seed": 3},
            "measured otherwise than .*metrics.json .num_images: 50000 . 24.*take it out",
        ),
        ({}, {"num_images": 24, "earlier_versions_knew_less": 1}, None),
        ({"sample.num_images": 50_000}, {"num_images": 50_000}, None),  # as variants of this study are
    ],
)
def test_runs_that_were_measured_otherwise_elsewhere_do_not_count(
    varied: dict[str, object], protocol: dict[str, object], says: str | None, results: Results,
    planned: list[Planned], tmp_path: Path,
) -> None:  # fmt: skip
    study = results.study.model_copy(update={"variants": {"kd": {}, "shd": varied, "mean": {}}})
    write_results(replace(results, study=study, protocol=protocol), tmp_path / "there")
    study = study.model_copy(update={"known": [str(tmp_path / "there" / "study.json")], "seeds": [2]})
    here = replace(planned[0], seed=9, run=RunFolder(tmp_path / "own"))  # a run that is not known
    run = here.run
    run.evaluation_file.parent.mkdir(parents=True)
    run.evaluation_file.write_text(json.dumps({"fid": 5.0, "protocol": {"num_images": 24, "seed": 9}}))
    (run.path / "environment.json").write_text('{"commit": "abc"}')
    line = {"step": 1, "seconds_per_step": 1.0, "validation": {"fid": 7.0}}
    run.metrics_file.write_text(json.dumps(line) + "\n")
    write_summary(run.path, "distill", here.config.train.max_steps)
    known = read_known(study, [here, *planned])
    if says is None:
        assert len(collect(study, [here, *planned], known).outcomes) == 1 + len(known.outcomes)
    else:
        with pytest.raises(UserError, match=says):
            collect(study, [here, *planned], known)


def test_runs_of_another_teacher_do_not_count(
    study: StudyConfig,
    planned: list[Planned],
    elsewhere: Path,
    tmp_path: Path,
) -> None:
    evaluate_teacher(tmp_path, 10.5)
    with pytest.raises(UserError, match="its teacher has other metrics than"):
        read_known(study.model_copy(update={"known": [str(elsewhere)]}), planned)


def test_only_some_variants_run_under_a_condition(study: StudyConfig) -> None:
    some = StudyConfig.model_validate({**TREE, "only": {"long": ["mean", "kd"]}})
    assert [some.variants_of(each) for each in some.conditions] == [["kd", "shd", "mean"], ["kd", "mean"]]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("only", {"longer": ["kd"]}, "`only` has `longer`, which is none of the conditions"),
        ("only", {"long": ["vkd"]}, "`only.long` has `vkd`, which is none of the variants"),
        ("reference", "none", "none of the variants"),
        ("seeds", [1, 1], "one seed twice"),
        ("variants", {"../x": {}}, "names a folder"),
        ("variants", {}, "variants"),
        ("variants", {"kd": {}, "": {}}, "a variant has no name"),
        ("budgets", {}, "budget"),
        ("overrides", {"seed": 3}, "`overrides` has `seed`, which `seeds` gives"),
        ("variants", {"kd": {"sample": {"seed": 3}}}, "`variants.kd` has `sample.seed`"),
    ],
)
def test_a_wrong_study_is_one_line(key: str, value: object, says: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({**TREE, key: value}))
    with pytest.raises(UserError, match=says) as error:
        read_config(path, StudyConfig)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
