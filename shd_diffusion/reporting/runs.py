"""A run folder as typed data: what training, sampling and evaluation left there. Computes nothing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError, safe_open

from shd_diffusion.config import parse_yaml
from shd_diffusion.errors import UserError, one_line
from shd_diffusion.files import read_as
from shd_diffusion.progress import printable
from shd_diffusion.protocol import flatten, is_of_step
from shd_diffusion.run_folder import run_name
from shd_diffusion.summary import Summary

VALIDATION = "validation"
"""The key of the validation's metrics in a line of metrics.jsonl."""

Array = NDArray[np.float64]


class Result(BaseModel):
    """What a stage wrote as JSON. Keys that are not named here are left alone."""

    model_config = ConfigDict(frozen=True)


ResultT = TypeVar("ResultT", bound=Result)
PartT = TypeVar("PartT")


class Environment(Result):
    """Where and how a run took place, with whatever else was noted; the same of each session that went on with it."""

    model_config = ConfigDict(extra="allow")
    command: str | None = None
    commit: str | None = None
    started: str | None = None
    resumed: list[Environment] = []


class Samples(Result):
    """Images `000000.png` ... with their labels or prompts, if they are made from these, made with `protocol`."""

    num_images: int
    labels: list[int] | None = None
    class_names: dict[int, str] | None = None
    prompts: list[str] | None = None
    seconds_per_image: float
    protocol: dict[str, Any] = {}


class Estimate(Result):
    """A mean over `n` images with its 95 % interval, which one image alone does not have."""

    mean: float
    low: float | None = None
    high: float | None = None
    n: int


class AgainstTeacher(Result):
    """A student's images against its teacher's of the same noise and prompt or label: `measures` by name."""

    measures: dict[str, Estimate]
    protocol: dict[str, Any] = {}
    notes: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _by_kind(cls, content: Any) -> Any:
        """In the file all stand side by side."""
        if not isinstance(content, dict):
            return content
        measures = {k: v for k, v in content.items() if isinstance(v, dict) and "mean" in v}
        return content | {"measures": measures}


class Metrics(Result):
    """Metrics of one evaluation: `values` by name, if finite, and all that they depend on."""

    values: dict[str, float]
    per_class_fid: dict[str, float] = {}
    against_teacher: AgainstTeacher | None = None
    protocol: dict[str, Any] = {}
    warnings: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _by_kind(cls, content: Any) -> Any:
        """In the file all stand side by side."""
        if not isinstance(content, dict):
            return content
        numbers = {k: v for k, v in content.items() if isinstance(v, int | float) and -1e300 < v < 1e300}
        return content | {"values": numbers}

    @property
    def features(self) -> str | None:
        """Name of the features that the metrics are computed on."""
        return self.protocol.get("features")


class Quartiles(Result):
    """A median over rounds, with the quartiles."""

    median: float = Field(gt=0)
    quartiles: tuple[float, float]


class Timing(Result):
    """Seconds of `batch_size` samples at once, of a denoiser's call or of sampling an `image`; bytes at most."""

    what: str
    batch_size: int = Field(ge=1)
    seconds: Quartiles
    per_second: float
    peak_bytes: int


class Benchmark(Result):
    """What a model costs, beside others; `benchmark` says how that was measured."""

    benchmark: dict[str, Any]
    environment: dict[str, Any]
    macs_call: int
    macs_image: int | None = None
    calls_per_image: int | None = None
    timings: list[Timing] = Field(min_length=1)


class Neighbour(Result):
    """A real image and its distance from a sample."""

    name: str
    distance: float


class NearSample(Result):
    """A sample and the real images nearest to it; `spacing` is the distance from the first of these to the next one."""

    index: int
    label: int | None
    spacing: float
    nearest: list[Neighbour] = Field(min_length=1)


class Nearest(Result):
    """A few samples with their neighbours among the images of `reference`; or a `note` why there are none."""

    reference: str
    note: str | None = None
    samples: list[NearSample] = Field([], min_length=1)


class Term(Result):
    """A term of the loss at one step, before its weight, and its part of the total, 0 to 1."""

    value: float
    share: float


class Validation(Result):
    """While training: the Fréchet distance on a few samples, and the terms of the loss on a few fixed items, those that
    the teacher has of its own too."""

    fid: float | None = None
    terms: dict[str, float] | None = None
    teacher: dict[str, float] = {}

    @model_validator(mode="after")
    def _is_one(self) -> Validation:
        if self.fid is None and self.terms is None:
            raise ValueError("a validation has `fid` or `terms`")
        return self


class LogEntry(Result):
    """A line of metrics.jsonl. `shd_by_block` is the SHD term of a student block; `skipped` steps changed nothing."""

    step: int
    seconds_per_step: float = 0.0
    terms: dict[str, Term] = {}
    shd_by_block: dict[str, float] = {}
    validation: Validation | None = Field(None, alias=VALIDATION)
    skipped: list[str] | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """The logged steps of a run: L steps, NaN where a term was not computed."""

    steps: Array  # (L,), optimiser steps
    seconds: Array  # (L,), a step, since the logged one before
    values: dict[str, Array]  # by term, (L,)
    shares: dict[str, Array]  # by term, (L,)
    divergences: dict[str, Array]  # by student block, the SHD term of this block alone: (L,)
    validation: Array  # (V, 2), step and Fréchet distance
    validation_terms: dict[str, Array]  # by term, (V, 2), step and its value on fixed items
    teacher_terms: dict[str, Array]  # the same of the teacher, which does not change


class Word(Result):
    """A word of a prompt, that `encoder` was given, and which text keys are its own."""

    text: str
    encoder: str
    keys: list[int] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Texts:
    """How much of its attention each patch gives to each text key, mean over the heads: (keys, rows, columns)."""

    teacher: Array
    squeezed: Array
    student: Array


@dataclass(frozen=True, slots=True)
class BlockAttention:
    """One student block: M teacher heads squeezed to N, on one image and over S images.

    `weights` are the parts of the teacher's heads in each squeezed map, `residual` is the error that squeezing leaves,
    `divergence` that of the squeezed map to the student's. `grid` is that of the patches that the query rows are of;
    the keys from `text[0]` up to `text[1]` are text.
    """

    name: str
    teacher: Array  # (M, Q, K), maps on the image
    squeezed: Array  # (N, Q, K)
    student: Array  # (N, Q, K)
    coefficients: Array  # (S, merges), α of every merge
    weights: Array  # (S, N, M), mean over rows
    residual: Array  # (S, N)
    divergence: Array  # (S, N)
    text: Texts | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """What teacher and student attend to: the maps on `image` (C, H, W), statistics over more images.

    Of an image with a prompt, `words` are None where it is not known which text key is which word.
    """

    image: Array
    label: int | None
    timestep: int | None
    blocks: list[BlockAttention]
    prompt: str | None = None
    words: list[Word] | None = None


class Part(Result):
    """What became of a module: it has `after` of `before` heads or neurons, or is a block that left.

    `lost` is a share of the energy of its output, of a block that of the model's.
    """

    name: str
    what: Literal["heads", "neurons", "block"]
    before: int
    after: int
    lost: float


class Compression(Result):
    """What `compress` did; `lost` is a share of the energy of the model's prediction."""

    lost: float
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run. What a later stage has not written yet is None; so is what it wrote of an earlier state of the
    run, and `outdated` says what to do about that."""

    path: Path
    name: str
    summary: Summary
    config: dict[str, Any]
    environment: Environment | None
    log: Log | None
    samples: Samples | None
    metrics: Metrics | None
    benchmark: Benchmark | None
    nearest: Nearest | None
    attention: Attention | None
    compression: Compression | None
    outdated: str | None = None

    @property
    def is_teacher(self) -> bool:
        return self.summary.stage == "train-teacher"

    @property
    def command(self) -> str:
        """The command that trained it."""
        recorded = self.environment and self.environment.command
        return recorded or f"shd-diffusion {self.summary.stage} {self.path / 'config.yaml'}"

    @property
    def max_steps(self) -> int:
        """The steps that its config wants; those that it has, where that says nothing."""
        return int(flatten(self.config).get("train.max_steps", self.summary.steps))

    @property
    def training_seconds(self) -> float | None:
        """How long its steps took, by the log."""
        if self.log is None or not len(self.log.steps):
            return None
        return float((self.log.seconds * np.diff(self.log.steps, prepend=0)).sum()) or None

    def class_name(self, label: int) -> str:
        """What to call a class: its name where it has one."""
        return self.class_names.get(label, str(label))

    def label_text(self, label: int) -> str:
        """The same where nothing else says that it is a class."""
        return self.class_names.get(label, f"label {label}")

    @property
    def class_names(self) -> dict[int, str]:
        """Those of the classes that have one."""
        told = self.samples.class_names if self.samples else None
        names = dict(enumerate(self.summary.class_names or ())) | (told or {})
        return {number: printable(name) for number, name in names.items()}

    def metric(self, name: str) -> float | None:
        """A metric by its name in metrics.json; None where it was not computed or is no finite number."""
        return self.metrics.values.get(name) if self.metrics else None

    @property
    def seconds_per_image(self) -> float | None:
        return self.samples.seconds_per_image if self.samples else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders, teachers first and otherwise in the order given, under names that tell them apart.

    Raises:
        UserError: no path, a folder that is no finished run, or a damaged file in one.
    """
    if not paths:
        raise UserError("report: give at least one run folder, e.g. shd-diffusion report runs/demo/*")
    unique = list(dict.fromkeys(Path(path) for path in paths))
    runs = [read_run(path, printable(name)) for path, name in zip(unique, names_apart(unique), strict=True)]
    return sorted(runs, key=lambda run: not run.is_teacher)


def names_apart(paths: Sequence[Path]) -> list[str]:
    """The names of runs; where some are the same, the least of the ends of their paths that tell them apart."""
    names, parts = [run_name(path) for path in paths], [path.resolve().parts for path in paths]

    def end(own: tuple[str, ...]) -> str:
        depths = range(2, len(own) + 1)
        alone = (n for n in depths if sum(other[-n:] == own[-n:] for other in parts) == 1)
        return "/".join(own[-next(alone, len(own)) :])

    return [end(own) if names.count(name) > 1 else name for name, own in zip(names, parts, strict=True)]


def read_run(path: Path, name: str) -> Run:
    """Read one run folder.

    Raises:
        UserError: the folder is no finished run, or one of its files is damaged.
    """
    for required in ("config.yaml", "summary.json"):
        if not (path / required).is_file():
            raise UserError(
                f"{path / required}: missing, so {path} is not a finished run; "
                "give the folder that train-teacher or distill wrote, or let that command finish, "
                "or give --checkpoint latest"
            )

    def part(file: str, read: Callable[[Path], PartT]) -> PartT | None:
        return read(path / file) if (path / file).exists() else None

    run = Run(
        path=path,
        name=name,
        summary=read_as(path / "summary.json", Summary),
        config=_read_config(path / "config.yaml"),
        environment=part("environment.json", lambda file: read_as(file, Environment)),
        log=part("metrics.jsonl", read_log),
        samples=part("samples/sampling.json", lambda file: read_as(file, Samples)),
        metrics=part("evaluation/metrics.json", lambda file: read_as(file, Metrics)),
        benchmark=part("evaluation/benchmark.json", lambda file: read_as(file, Benchmark)),
        nearest=part("evaluation/nearest.json", lambda file: read_as(file, Nearest)),
        attention=part("attention.safetensors", read_attention),
        compression=part("compression.json", lambda file: read_as(file, Compression)),
    )
    return _without_outdated(run)


def _without_outdated(run: Run) -> Run:
    """The run without images of fewer steps than it has now, and without metrics of other images than there are."""
    samples, metrics = run.samples, run.metrics
    folder, steps, shown = shlex.quote(str(run.path)), run.summary.steps, samples or metrics
    evaluate = f"run `shd-diffusion evaluate {folder}`"
    if shown and not is_of_step(shown.protocol, steps):
        step = shown.protocol["steps_trained"]
        delete = f"delete {run.path / 'samples'}, " if samples else ""
        outdated = (
            f"{run.path}: its {'images' if samples else 'metrics'} are of step {step}, and the run has come to {steps} "
            f"since; {delete}run `shd-diffusion sample {folder}`, and {evaluate}"
        )
        return replace(run, samples=None, metrics=None, nearest=None, outdated=outdated)
    if samples is None or metrics is None:
        return run
    evaluated = flatten(metrics.protocol)
    for key, value in flatten(samples.protocol).items():
        if evaluated.get(key) != value:
            outdated = (
                f"{run.path}: its metrics are of other images than there are now (`{key}` was "
                f"{evaluated.get(key, '–')}, and is {value}); {evaluate}"
            )
            return replace(run, metrics=None, nearest=None, outdated=outdated)
    return run


def read_entries(path: Path) -> list[LogEntry]:
    """The steps of metrics.jsonl in their order, without those that were skipped and a last line that was cut off.

    Raises:
        UserError: another line is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); repeat the training's command") from None
    by_step: dict[int, LogEntry] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = LogEntry.model_validate(json.loads(line))
            by_step[entry.step] = entry  # a resumed run logs a step again: the later line holds
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not a logged step; remove that line") from None
    return [entry for _, entry in sorted(by_step.items()) if entry.skipped is None]


def read_log(path: Path) -> Log:
    """Read metrics.jsonl; see `read_entries`."""
    entries = read_entries(path)
    terms = list(dict.fromkeys(term for entry in entries for term in entry.terms))
    blocks = list(dict.fromkeys(block for entry in entries for block in entry.shd_by_block))
    flat = [flatten(entry.model_dump()) for entry in entries]

    def column(key: str) -> Array:
        return np.array([entry.get(key, np.nan) for entry in flat], float)

    return Log(
        steps=column("step"),
        seconds=column("seconds_per_step"),
        values={term: column(f"terms.{term}.value") for term in terms},
        shares={term: column(f"terms.{term}.share") for term in terms},
        divergences={block: column(f"shd_by_block.{block}") for block in blocks},
        validation=_points((e.step, e.validation.fid) for e in entries if e.validation),
        validation_terms=_by_term((e.step, e.validation.terms or {}) for e in entries if e.validation),
        teacher_terms=_by_term((e.step, e.validation.teacher) for e in entries if e.validation),
    )


def _by_term(found: Iterable[tuple[int, dict[str, float]]]) -> dict[str, Array]:
    """Steps and values of each term, where there is one."""
    entries = list(found)
    return {
        term: _points((step, terms.get(term)) for step, terms in entries)
        for term in dict.fromkeys(term for _, terms in entries for term in terms)
    }


def _points(found: Iterable[tuple[int, float | None]]) -> Array:
    """Steps and values, (V, 2), where there is one."""
    return np.array([(step, value) for step, value in found if value is not None], float).reshape(-1, 2)


def read_attention(path: Path) -> Attention:
    """Read attention.safetensors.

    Raises:
        UserError: the file is damaged or lacks a tensor of a block.
    """
    fields = ("teacher", "squeezed", "student", "coefficients", "weights", "residual", "divergence")
    try:
        with safe_open(path, framework="numpy") as file:
            description = json.loads((file.metadata() or {})["description"])
            names = [block["student"] for block in description["blocks"]]
            blocks = [
                _block(
                    name,
                    {f: file.get_tensor(f"{name}/{f}").astype(float) for f in fields},
                    _texts(file, name),
                )
                for name in names
            ]
            image = file.get_tensor("image").astype(float)
            words = description.get("words")
            words = None if words is None else [Word.model_validate(word) for word in words]
            _check_words(words or [], blocks)
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({one_line(error)}); delete it and repeat the distillation's command"
        ) from None
    return Attention(
        image,
        description.get("label"),
        description.get("timestep"),
        blocks,
        description.get("prompt"),
        words,
    )


def _block(name: str, tensors: dict[str, Array], text: Texts | None) -> BlockAttention:
    weights = tensors.pop("weights")  # by row (S, N, M, Q)
    return BlockAttention(
        name, weights=weights.mean(-1) if weights.ndim == 4 else weights, text=text, **tensors
    )


def _texts(file: Any, name: str) -> Texts | None:
    """What a block's patches attend to of its text, from an open file of tensors."""
    if f"{name}/teacher_text" not in file.keys():  # noqa: SIM118
        return None
    kinds = ("teacher", "squeezed", "student")
    return Texts(*(file.get_tensor(f"{name}/{kind}_text").astype(float) for kind in kinds))


def _check_words(words: Sequence[Word], blocks: Sequence[BlockAttention]) -> None:
    """See that words are within the text that is attended to. Raises ValueError: they are not."""
    keys = [0, *(key for word in words for key in word.keys)]
    for block in blocks:
        if block.text and not 0 <= min(keys) <= max(keys) < len(block.text.teacher):
            raise ValueError(f"{block.name}: its text has not the keys of the prompt")


def _read_config(path: Path) -> dict[str, Any]:
    """The resolved config as plain values: a report reads runs whose config later versions would refuse."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a YAML mapping; give the folder that train-teacher or distill wrote")
    return tree
