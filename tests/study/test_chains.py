"""Variants that begin with the run of another: which paths they get, and in which order they run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import DISTILL_CONFIG, ROOT

from shd_diffusion.config import read_config
from shd_diffusion.study import runner
from shd_diffusion.study.config import Budget, StudyConfig, plan_runs


def chain(**variants: dict[str, object]) -> StudyConfig:
    tree = {"title": "A chain", "distill": str(DISTILL_CONFIG), "output": "x", "seeds": [0, 1]}
    return StudyConfig.model_validate({**tree, "variants": variants, "reference": next(iter(variants))})


def test_a_variant_is_taught_by_the_run_of_an_earlier_one_from_the_same_seed(tmp_path: Path) -> None:
    study = chain(
        assistant={"student.arguments.num_attention_heads": 8}, student={"teacher.path": "variant:assistant"}
    )
    planned = plan_runs(study, tmp_path)
    assert [one.after for one in planned] == [(), ("assistant seed 0",), (), ("assistant seed 1",)]
    assert [one.config.teacher.path for one in planned] == [
        path
        for seed in (0, 1)
        for path in ("runs/digits/teacher", str(tmp_path / f"runs/assistant/seed-{seed}"))
    ]
    assert [str(one.run.path) for one in planned[::2]] == [one.config.teacher.path for one in planned[1::2]]


def test_it_must_be_an_earlier_one() -> None:
    with pytest.raises(
        ValueError, match=r"variant `a` begins with the run of `b`, which is no variant before"
    ):
        chain(a={"teacher.path": "variant:b"}, b={})


def test_the_shipped_chains_can_be_planned(tmp_path: Path) -> None:
    study = read_config(ROOT / "configs/studies/digits-chains.yaml", StudyConfig)
    assert sum(bool(one.after) for one in plan_runs(study, tmp_path)) == 3 * len(study.seeds)


def test_a_condition_has_all_that_its_variants_begin_with() -> None:
    study = chain(a={}, b={"teacher.path": "variant:a"})
    with pytest.raises(ValueError, match=r"`only.short` lacks `a`, which another variant there begins with"):
        StudyConfig.model_validate(
            {**study.model_dump(), "conditions": {"short": {}}, "only": {"short": ["b"]}}
        )


def test_what_is_known_is_made_only_for_those_that_begin_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two chains a-b-c, of which a and b are known, one has its c already."""
    study = chain(a={}, b={"teacher.path": "variant:a"}, c={"teacher.path": "variant:b"}, other={})
    planned = plan_runs(study, tmp_path)
    known = {each.place for each in planned if each.variant != "c" or each.seed == 1}
    begun: list[str] = []
    monkeypatch.setattr(
        runner, "_run_all", lambda jobs, *_: begun.extend(job.name for job in jobs) or runner.Ended()
    )
    runner.carry_out(study, planned, known, tmp_path, "shd_diffusion.cli")
    assert begun == ["a seed 0", "b seed 0", "c seed 0"]


@dataclass
class Process:
    """One that ends when it is asked for the third time."""

    returncode: int
    polls: int = 0

    def poll(self) -> int | None:
        self.polls += 1
        return self.returncode if self.polls > 2 else None


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_begins_before_what_it_waits_for(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    slots: dict[str, int] = {}

    def start(job: runner.Job, slot: int) -> Process:
        slots[job.name] = slot
        return Process(int(fails and job.name == "a"))

    monkeypatch.setattr(runner, "announce", events.append)
    monkeypatch.setattr(runner.time, "sleep", lambda _: None)
    after = {"a": (), "b": ("d", "a"), "c": ("b",), "d": ()}
    jobs = [runner.Job(name, [["x"]], Path("x"), needed) for name, needed in after.items()]
    failed = runner._run_all(jobs, Budget(), 2, start).failed
    begun = [event.partition(":")[0] for event in events if ": begun," in event]
    assert begun == (["a", "d"] if fails else ["a", "d", "b", "c"])
    assert failed == (["a", "b", "c"] if fails else [])
    assert slots == ({"a": 0, "d": 1} if fails else {"a": 0, "d": 1, "b": 0, "c": 0})
    if not fails:  # "a" and "d" run side by side, "c" waits for "b"
        assert events.index("b: begun, 3 of 4") > next(i for i, e in enumerate(events) if "a: done" in e)
        assert events.index("c: begun, 4 of 4") > next(i for i, e in enumerate(events) if "b: done" in e)


def test_runs_that_cannot_begin_cost_no_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(runner, "announce", events.append)
    monkeypatch.setattr(runner.time, "sleep", lambda _: None)
    after = {"a": (), "b": ("a",), "c": ("b",), "d": (), "e": ()}
    jobs = [runner.Job(name, [["x"]], Path("x"), needed) for name, needed in after.items()]
    runner._run_all(jobs, Budget(runs=2), 1, lambda job, _: Process(int(job.name == "a")))
    assert [event.partition(":")[0] for event in events if ": begun," in event] == ["a", "d"]


@pytest.mark.parametrize(
    ("visible", "processes", "expected"),
    [(None, 4, ["0", "1", "2", "0"]), ("5,7", 3, ["5", "7", "5"]), (None, 1, [None]), ("3", 2, [None, None])],
)
def test_runs_side_by_side_have_a_gpu_each(
    visible: str | None, processes: int, expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 3)
    found = [runner._share(slot, processes).get("CUDA_VISIBLE_DEVICES") for slot in range(processes)]
    assert found == expected
