"""A run folder as typed data: what training, sampling and evaluation left there. Computes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open

from shd_diffusion.config import parse_yaml
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_json
from shd_diffusion.protocol import flatten

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Log:
    """The logged steps of a run: L steps, NaN where a term was not computed.

    Attributes:
        steps: (L,), optimiser steps.
        values: by term, the unweighted value: (L,).
        shares: by term, its part of the total loss, 0 to 1: (L,).
        divergences: by student block, the SHD term of this block alone: (L,).
        watched: (W, 2), step and Fréchet distance where it was watched.
    """

    steps: Array
    values: dict[str, Array]
    shares: dict[str, Array]
    divergences: dict[str, Array]
    watched: Array


@dataclass(frozen=True, slots=True)
class Samples:
    """Images `000000.png` … with their labels, made with `protocol`."""

    folder: Path
    labels: list[int]
    seconds_per_image: float
    protocol: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures of one evaluation by their names, 95 % intervals of some, and all that they depend on."""

    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_class_fid: dict[str, float]
    protocol: dict[str, Any]
    warnings: list[str]

    @property
    def features(self) -> str | None:
        """Name of the features that the figures are computed on."""
        return self.protocol.get("features")


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A sample and the real images nearest to it, the nearest first.

    Attributes:
        index: of the sample.
        label: that was asked for, where it is known.
        names: of the real images.
        relative: their distances, in units of that from the nearest real image to the next real one; None where
            that is 0.
    """

    index: int
    label: int | None
    names: list[str]
    relative: list[float | None]


@dataclass(frozen=True, slots=True)
class Nearest:
    """A few samples with their neighbours; or a `note` why there are none.

    Attributes:
        reference: where the real images are from.
        rows: one for each sample.
        picture: (rows · H, columns · W, 3), a row a sample: the sample itself, then its neighbours.
    """

    reference: str
    rows: list[Neighbours]
    picture: NDArray[np.uint8]
    note: str | None


@dataclass(frozen=True, slots=True)
class BlockAttention:
    """One student block: M teacher heads squeezed to N, on one image and over S images.

    Attributes:
        name: the student's block.
        teacher: (M, Q, K) maps of the teacher's heads on the image.
        squeezed: (N, Q, K).
        student: (N, Q, K).
        coefficients: (S, merges), α of every merge.
        weights: (S, N, M), parts of the teacher's heads in each squeezed map; where they differ from row to
            row, their mean.
        residual: (S, N), error that squeezing leaves.
        divergence: (S, N), of the squeezed map to the student's.
    """

    name: str
    teacher: Array
    squeezed: Array
    student: Array
    coefficients: Array
    weights: Array
    residual: Array
    divergence: Array


@dataclass(frozen=True, slots=True)
class Attention:
    """What teacher and student attend to: the maps on `image` (C, H, W), statistics over more images."""

    image: Array
    label: int | None
    timestep: int | None
    blocks: list[BlockAttention]


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run. What a later stage has not written yet is None."""

    path: Path
    name: str
    summary: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any] | None
    log: Log | None
    samples: Samples | None
    metrics: Metrics | None
    nearest: Nearest | None
    attention: Attention | None

    @property
    def is_teacher(self) -> bool:
        return self.summary["stage"] == "train-teacher"

    @property
    def command(self) -> str:
        """The command that trained it."""
        recorded = (self.environment or {}).get("command")
        return recorded or f"shd-diffusion {self.summary['stage']} {self.path / 'config.yaml'}"

    def figure(self, name: str) -> float | None:
        """A metric by its name in metrics.json; None where it was not computed or is no finite number."""
        return self.metrics.figures.get(name) if self.metrics else None

    @property
    def seconds_per_image(self) -> float | None:
        return self.samples.seconds_per_image if self.samples else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders, teachers first and otherwise in the order given, under names that tell them apart.

    Raises:
        UserError: no path, a folder that is no finished run, or a damaged file in one.
    """
    if not paths:
        raise UserError("report: give at least one run folder, e.g. shd-diffusion report runs/digits/*")
    unique = list(dict.fromkeys(Path(path) for path in paths))
    names = [path.resolve().name for path in unique]
    clash = len(set(names)) < len(names)
    runs = [read_run(path, str(path) if clash else name) for path, name in zip(unique, names, strict=True)]
    return sorted(runs, key=lambda run: not run.is_teacher)


def read_run(path: Path, name: str) -> Run:
    """Read one run folder.

    Raises:
        UserError: the folder is no finished run, or one of its files is damaged.
    """
    for required in ("config.yaml", "summary.json"):
        if not (path / required).is_file():
            raise UserError(
                f"{path / required}: missing, so {path} is not a finished run; "
                "give the folder that train-teacher or distill wrote, or let that command finish"
            )
    return Run(
        path=path,
        name=name,
        summary=_mapping(path / "summary.json", ("stage", "parameters", "heads")),
        config=_read_config(path / "config.yaml"),
        environment=_mapping(path / "environment.json") if (path / "environment.json").exists() else None,
        log=read_log(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else None,
        samples=_read_samples(path / "samples") if (path / "samples/sampling.json").exists() else None,
        metrics=(
            _read_metrics(path / "evaluation/metrics.json")
            if (path / "evaluation/metrics.json").exists()
            else None
        ),
        nearest=(
            read_nearest(path / "evaluation/nearest.json")
            if (path / "evaluation/nearest.json").exists()
            else None
        ),
        attention=(
            read_attention(path / "attention.safetensors")
            if (path / "attention.safetensors").exists()
            else None
        ),
    )


def read_log(path: Path) -> Log:
    """Read metrics.jsonl; steps that were skipped, and a last line that an interruption cut off, are left out.

    Raises:
        UserError: another line is damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            by_step[entry["step"]] = entry  # a resumed run logs a step again: the later line holds
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not a logged step; remove that line") from None
    entries = [entry for _, entry in sorted(by_step.items()) if "skipped" not in entry]
    terms = list(dict.fromkeys(term for entry in entries for term in entry.get("terms", {})))
    blocks = list(dict.fromkeys(block for entry in entries for block in entry.get("divergence", {})))
    flat = [flatten(entry) for entry in entries]

    def column(key: str) -> Array:
        return np.array([entry.get(key, np.nan) for entry in flat], float)

    return Log(
        steps=np.array([entry["step"] for entry in entries], float),
        values={term: column(f"terms.{term}.value") for term in terms},
        shares={term: column(f"terms.{term}.share") for term in terms},
        divergences={block: column(f"divergence.{block}") for block in blocks},
        watched=np.array([(e["step"], e["watch"]["fid"]) for e in entries if "watch" in e]).reshape(-1, 2),
    )


def read_attention(path: Path) -> Attention:
    """Read attention.safetensors.

    Raises:
        UserError: the file is damaged or lacks a tensor of a block.
    """
    fields = ("teacher", "squeezed", "student", "coefficients", "weights", "residual", "divergence")
    try:
        with safe_open(path, framework="numpy") as file:
            description = json.loads((file.metadata() or {})["description"])
            blocks = [
                _block(name, {field: file.get_tensor(f"{name}/{field}").astype(float) for field in fields})
                for name in (block["student"] for block in description["blocks"])
            ]
            image = file.get_tensor("image").astype(float)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: damaged ({error}); delete it and repeat the distillation's command"
        ) from None
    return Attention(image, description.get("label"), description.get("timestep"), blocks)


def read_nearest(path: Path) -> Nearest:
    """Read evaluation/nearest.json and the picture beside it.

    Raises:
        UserError: either is damaged.
    """
    content = _mapping(path, ("reference",))
    if note := content.get("note"):
        return Nearest(content["reference"], [], np.empty((0, 0, 3), np.uint8), note)
    try:
        rows = [
            Neighbours(
                entry["index"],
                entry["label"],
                [each["name"] for each in entry["nearest"]],
                [
                    each["distance"] / entry["spacing"] if entry["spacing"] else None
                    for each in entry["nearest"]
                ],
            )
            for entry in content["samples"]
        ]
        with Image.open(path.with_suffix(".png")) as file:
            picture = np.asarray(file.convert("RGB"))
        if picture.shape[0] % len(rows) or picture.shape[1] % (1 + len(rows[0].names)):
            raise ValueError("the picture has other rows or columns")
    except (OSError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        run = path.parent.parent
        raise UserError(f"{path}: damaged ({error}); run `shd-diffusion evaluate {run}` again") from None
    return Nearest(content["reference"], rows, picture, None)


def _block(name: str, tensors: dict[str, Array]) -> BlockAttention:
    weights = tensors.pop("weights")
    return BlockAttention(name, weights=weights.mean(-1) if weights.ndim == 4 else weights, **tensors)


def _read_config(path: Path) -> dict[str, Any]:
    """The resolved config as plain values: a report reads runs whose config later versions would refuse."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a YAML mapping; give the folder that train-teacher or distill wrote")
    return tree


def _read_samples(folder: Path) -> Samples:
    content = _mapping(folder / "sampling.json", ("labels", "seconds_per_image"))
    return Samples(folder, content["labels"], content["seconds_per_image"], content.get("protocol", {}))


def _read_metrics(path: Path) -> Metrics:
    content = _mapping(path)
    figures = {
        key: float(value)
        for key, value in content.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    per_class = {str(label): float(value) for label, value in content.get("per_class_fid", {}).items()}
    intervals = {
        key.removesuffix("_interval"): (float(value[0]), float(value[1]))
        for key, value in content.items()
        if key.endswith("_interval")
    }
    return Metrics(figures, intervals, per_class, content.get("protocol", {}), content.get("warnings", []))


def _mapping(path: Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON object that has the required keys."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; delete it and run the command that wrote it again")
    for key in required:
        if key not in content:
            raise UserError(f"{path}: key `{key}` is missing; run the command that wrote the file again")
    return content
