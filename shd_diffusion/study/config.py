"""The configuration of a study: one distillation, variants and conditions as overrides, seeds, a budget."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from shd_diffusion.config import DistillConfig, RunConfig, Section, read_config
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_as
from shd_diffusion.protocol import flatten
from shd_diffusion.run_folder import RunFolder

Overrides = dict[str, Any]

Place = tuple[str, str, int]
"""A run in its study: condition, variant, seed."""

MEASURED = ("sample", "evaluate", "train.max_steps", "train.micro_batch_size", "train.validation")
"""What a run may have otherwise and stay the same run, but not the same measurement."""

UNMEASURED = "sample.batch_size"
"""Of these, what changes no image."""

SEEDS = ("seed", "sample.seed")
"""What the seeds of a study are set as."""

VARIANT = "variant:"
"""Before the name of a variant, in place of a path."""


class Budget(Section):
    """When no further run is begun: after so many hours of one command, or so many runs of it; 0 runs write up what is
    there."""

    hours: float | None = Field(None, gt=0)
    runs: int | None = Field(None, ge=0)


class StudyConfig(Section):
    """A study: every variant under every condition from every seed.

    Paths are as in other configs, relative to where the command runs.

    Attributes:
        distill: the config of a distillation.
        output: the folder of the study.
        teacher: a `train-teacher` config; its run goes to the `teacher.path` of `distill`, if it is not there yet.
        compressed: options of `compress` by name, such as `{heads: 6, neurons: 0.5}`: models that are made of the
            teacher before the runs. In overrides, `student.pretrained` takes such a name for its folder.
        overrides: of `distill`, dotted key to value, for all runs.
        variants: what is compared, by name; overrides on top. A path `variant:NAME`, as of `teacher.path`, is the run
            of an earlier variant from the same seed: an assistant between teacher and student, the student of one
            generation as the teacher of the next, or several students whose weights are averaged, in a list.
        conditions: under which it is compared, by name, such as numbers of steps; overrides between the two.
            Only runs of the same condition are compared.
        only: the variants of a condition, by its name, where these are not all.
        reference: the variant that the others are compared with.
        metrics: of `evaluation/metrics.json`, to be compared; the first one is drawn.
        targets: Fréchet distances; the table tells when the validation's falls to them.
        after_seconds: times; the validation's distance after so many seconds of training is compared like a metric.
        known: `study.json` files of the same study from elsewhere, such as another machine: their runs count as done,
            where they have the same overrides and a teacher of the same metrics.
        processes: runs at a time.
        submitit: without it runs are processes of this machine, with it jobs of a cluster: the parameters of submitit's
            executor, such as `{cluster: slurm, timeout_min: 240, slurm_partition: gpu, gpus_per_node: 1}`.
    """

    title: str
    distill: str
    output: str
    teacher: str | None = None
    compressed: dict[str, dict[str, Any]] = Field(default_factory=dict)
    overrides: Overrides = Field(default_factory=dict)
    variants: dict[str, Overrides] = Field(min_length=1)
    conditions: dict[str, Overrides] = Field({"": {}}, min_length=1)
    only: dict[str, list[str]] = Field(default_factory=dict)
    seeds: list[int] = Field(min_length=1)
    reference: str
    metrics: list[str] = Field(["fid"], min_length=1)
    targets: list[float] = Field(default_factory=list)
    after_seconds: list[float] = Field(default_factory=list)
    known: list[str] = Field(default_factory=list)
    budget: Budget = Budget()
    processes: int = Field(1, ge=1)
    submitit: dict[str, Any] | None = None

    @field_validator("variants", "conditions", "only", mode="before")
    @classmethod
    def _nothing_overridden(cls, value: Any) -> Any:
        """A name without overrides needs no braces behind it; a number will do as a name."""
        return {str(k): v or {} for k, v in value.items()} if isinstance(value, Mapping) else value

    @field_validator("variants", "conditions", "compressed")
    @classmethod
    def _names_make_folders(cls, value: dict[str, Overrides]) -> dict[str, Overrides]:
        for name in value:
            if not re.fullmatch(r"[\w.+-]*", name) or name.startswith("."):
                raise ValueError(f"`{name}` names a folder: use letters, digits, `-`, `_`, `+` and `.`")
        return value

    @field_validator("variants")
    @classmethod
    def _are_named(cls, value: dict[str, Overrides]) -> dict[str, Overrides]:
        if "" in value:
            raise ValueError("a variant has no name; give it one")
        return value

    @model_validator(mode="after")
    def _is_a_plan(self) -> StudyConfig:
        if self.reference not in self.variants:
            raise ValueError(f"`reference` is {self.reference!r}, which is none of the variants")
        if len({*self.seeds}) < len(self.seeds):
            raise ValueError("`seeds` has one seed twice")
        for condition, only in self.only.items():
            if condition not in self.conditions:
                raise ValueError(f"`only` has `{condition}`, which is none of the conditions")
            if wrong := [name for name in only if name not in self.variants]:
                raise ValueError(f"`only.{condition}` has `{wrong[0]}`, which is none of the variants")
            lacking = (other for name in only for other in follows(self.variants[name]) if other not in only)
            if (other := next(lacking, None)) is not None:
                raise ValueError(
                    f"`only.{condition}` lacks `{other}`, which another variant there begins with"
                )
        for where, overrides in self._layers.items():
            if (seed := next((key for key in SEEDS if key in flatten(overrides)), None)) is not None:
                raise ValueError(f"`{where}` has `{seed}`, which `seeds` gives to every run; remove it")
        names = list(self.variants)
        for place, (name, overrides) in enumerate(self.variants.items()):
            for other in follows(overrides):
                if other not in names[:place]:
                    raise ValueError(
                        f"variant `{name}` begins with the run of `{other}`, which is no variant before it"
                    )
        return self

    @property
    def _layers(self) -> dict[str, Overrides]:
        """All overrides, by their place in the study."""
        return {
            "overrides": self.overrides,
            **{f"conditions.{name}": overrides for name, overrides in self.conditions.items()},
            **{f"variants.{name}": overrides for name, overrides in self.variants.items()},
        }

    def variants_of(self, condition: str) -> list[str]:
        """The variants that run under a condition."""
        only = self.only.get(condition, self.variants)
        return [name for name in self.variants if name in only]

    def overridden(self, condition: str, variant: str) -> Overrides:
        """What a run has otherwise than `distill`, but for its seed, in the order in which it is to be set.

        A section of a condition comes after the keys in it that the overrides set, and before those of the variant.
        """
        layers = (self.overrides, self.conditions[condition], self.variants[variant])
        found: Overrides = {}
        for key, value in chain.from_iterable(layer.items() for layer in layers):
            found.pop(key, None)  # else it would keep the place that it had
            found[key] = value
        return found

    def asked(self, condition: str, variant: str) -> tuple[str, Overrides, dict[str, Any] | None]:
        """All that makes a run what it is, but for its seed and what stands in `distill`."""
        overrides = self.overridden(condition, variant)
        pretrained = overrides.get("student.pretrained")
        made = self.compressed.get(pretrained) if isinstance(pretrained, str) else None
        return self.distill, overrides, made

    @property
    def varied(self) -> set[str]:
        """Keys of how a run is measured in which its own runs may differ."""
        overrides = chain(*map(flatten, (*self.variants.values(), *self.conditions.values())))
        return {key.split(".")[1] for key in overrides if key.startswith(("sample.", "evaluate."))}

    @property
    def compared(self) -> list[str]:
        """All that is compared: the metrics, and the validation's distance after equal seconds."""
        return [*self.metrics, *map(validation_after, self.after_seconds)]


def follows(overrides: Overrides) -> list[str]:
    """The variants whose runs one begins with; none for most."""
    values = chain.from_iterable(v if isinstance(v, list) else [v] for v in overrides.values())
    paths = (value for value in values if isinstance(value, str) and value.startswith(VARIANT))
    return list(dict.fromkeys(path.removeprefix(VARIANT) for path in paths))


def with_paths(value: Any, paths: Mapping[str, str]) -> Any:
    """An override with paths in place of names of variants, by these."""
    if isinstance(value, list):
        return [with_paths(each, paths) for each in value]
    return paths.get(value, value) if isinstance(value, str) else value


def validation_after(seconds: float) -> str:
    """What to call the validation's Fréchet distance after so many seconds."""
    return f"validation_fid_after_{seconds:g}_s"


@dataclass(frozen=True)
class Planned:
    """One run of a study; `after` are the runs that it begins with."""

    condition: str
    variant: str
    seed: int
    run: RunFolder
    config: DistillConfig
    overrides: tuple[str, ...]
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return run_name(self.condition, self.variant, self.seed)

    @property
    def is_complete(self) -> bool:
        """Whether it is trained to its last step, sampled and evaluated since.

        Raises:
            UserError: a file is damaged.
        """
        return self.run.is_complete(self.config) and self.run.is_evaluated()

    @property
    def place(self) -> Place:
        """What tells it from the study's other runs."""
        return self.condition, self.variant, self.seed


def run_name(condition: str, variant: str, seed: int) -> str:
    """What to call a run of a study."""
    return " ".join(part for part in (condition, variant, f"seed {seed}") if part)


def run_folder(output: Path, condition: str, variant: str, seed: int) -> Path:
    """Where a run of a study lies."""
    return output / "runs" / condition / variant / f"seed-{seed}"


def teacher_of(study: StudyConfig) -> str:
    """The path of the teacher whose config the study names; variants and conditions may have others."""
    return read_config(Path(study.distill), DistillConfig, _assignments(study.overrides)).teacher.path


def _assignments(overrides: Overrides) -> tuple[str, ...]:
    """Overrides as `--set` takes them."""
    return tuple(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in overrides.items())


def plan_runs(study: StudyConfig, output: Path) -> list[Planned]:
    """All runs of a study, seed after seed, so that what is there is always paired.

    Runs of one seed and condition differ in their overrides alone, and so share initial weights, data order,
    noise and the noise that images are sampled from.

    Raises:
        UserError: the config or an override is wrong, or a folder holds a run of another config.
    """
    planned = []
    for seed in study.seeds:
        for condition in study.conditions:
            for variant in study.variants_of(condition):
                tree = {**study.overridden(condition, variant), "seed": seed, "sample.seed": seed}
                name = tree.get("student.pretrained")
                if isinstance(name, str) and name in study.compressed:
                    tree["student.pretrained"] = str(compressed_folder(output, name))
                before = follows(study.variants[variant])
                paths = {VARIANT + b: str(run_folder(output, condition, b, seed)) for b in before}
                tree = {key: with_paths(value, paths) for key, value in tree.items()}
                overrides = _assignments(tree)
                config = read_config(Path(study.distill), DistillConfig, overrides)
                run = RunFolder(run_folder(output, condition, variant, seed))
                check(run, config)
                after = tuple(run_name(condition, b, seed) for b in before)
                planned.append(Planned(condition, variant, seed, run, config, overrides, after))
    return planned


def compressed_folder(output: Path, name: str) -> Path:
    """Where a study keeps a model that was made of its teacher."""
    return output / "compressed" / name


def check(run: RunFolder, config: DistillConfig) -> None:
    """As `RunFolder.check`, and the run is measured in the same way.

    Raises:
        UserError: the folder belongs to another config.
    """
    run.check(config)
    if not run.config_file.exists():
        return
    there, now = _measured(run.read_config()), _measured(config)
    for key in sorted(there.keys() | now.keys()):
        if there.get(key) != now.get(key):
            raise UserError(
                f"{run.config_file}: `{key}` is another than the study's; "
                "give the study another `output` or delete the folder"
            )


def _measured(config: RunConfig) -> dict[str, Any]:
    """What a run's measurement depends on beside the run itself, by dotted key."""
    flat = flatten(config.model_dump(mode="json", by_alias=True))
    wanted = tuple(f"{key}." for key in MEASURED)
    return {key: value for key, value in flat.items() if f"{key}.".startswith(wanted) and key != UNMEASURED}


def check_inputs(planned: Sequence[Planned]) -> None:
    """See that runs which name the same data, teacher or pretrained student began with the same.

    Raises:
        UserError: one began with another, such as a teacher that was trained anew at the same place.
    """
    seen: dict[tuple[str, str], tuple[str, Path]] = {}
    for each in (each for each in planned if each.run.inputs_file.exists()):
        named = {
            "data": each.config.trained_on,
            "teacher.path": each.config.teacher.path,
            "student.pretrained": each.config.student.pretrained,
        }
        inputs = read_as(each.run.inputs_file, dict[str, str])
        for key in inputs.keys() & named.keys():
            digest, file = seen.setdefault((key, repr(named[key])), (inputs[key], each.run.inputs_file))
            if inputs[key] != digest:
                raise UserError(
                    f"{each.run.inputs_file}: what `{key}` names was another when {file.parent} began, so the two do "
                    "not compare; delete the runs of one, or give the study another `output`"
                )
