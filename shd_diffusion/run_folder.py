"""A run is a folder: config, environment, metrics, checkpoints and what came out."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shd_diffusion.config import DistillConfig, RunConfig, TrainTeacherConfig, dump_config, read_run_config
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.files import check_ours, json_sha256, naming, read_as, write_json, write_text
from shd_diffusion.protocol import flatten, is_of_step
from shd_diffusion.squeezing.plan import PLANS_FILE
from shd_diffusion.summary import Summary

# What a run may be given anew without becoming another run, since its weights do not follow from it: where it is, how
# its work is shared and watched, and what happens after training.
FREE = (
    "output",
    "data.num_workers",
    "data.verify",
    "prepare",
    "sample",
    "evaluate",
    "teacher.device",
    "teacher.config",
    "losses.shd.chunk_rows",
    "losses.shd.compile",
    "train.max_steps",  # it may grow
    "train.gradient_checkpointing",
    "train.compile",
    "train.shard",
    "train.micro_batch_size",
    "train.num_processes",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.max_skipped_steps",
    "train.trackers",
    "train.validation",
)

# Where that lies which a run began with: it may move, and `check_inputs` sees that it is the same.
PLACES = ("data.path", "teacher.path", "pipeline", "model.pretrained", "student.pretrained")

# Of these, what a run may do without: with one, wherever it lies, it is another run than without.
OPTIONAL = ("pipeline", "model.pretrained", "student.pretrained")

PIPELINE = "pipeline"
"""Where its pipeline is, in a run's folder."""

STEPS = "steps"
"""Where checkpoints that were looked at are, in a run's folder."""


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of which there is a checkpoint, in ascending order; other names are left out."""
    names = (path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else ()
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-[0-9]{8,}", name))


def as_step(checkpoint: str) -> int:
    """The step of a checkpoint.

    Raises:
        UserError: it is no number.
    """
    if not (checkpoint.isdecimal() and checkpoint.isascii()):
        raise UserError(f"--checkpoint {checkpoint}: give a step, or latest")
    return int(checkpoint)


def run_name(path: Path) -> str:
    """What to call the run in a folder: a checkpoint of it by its step."""
    path = path.resolve()
    step = re.fullmatch(r"step-(\d+)", path.name)
    if path.parent.name != STEPS or step is None:
        return path.name
    return f"{path.parent.parent.name} at step {int(step[1])}"


@dataclass(frozen=True)
class RunFolder:
    """The paths inside a run folder."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def attention_file(self) -> Path:
        return self.path / "attention.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def at_step(self, step: int) -> RunFolder:
        """A run of its own: what this one had after so many steps."""
        return RunFolder(self.steps / f"step-{step:08d}")

    @property
    def steps(self) -> Path:
        return self.path / STEPS

    @property
    def pipeline(self) -> Path:
        """The folder itself where `compress` made it."""
        return self.path if (self.path / "model_index.json").is_file() else self.path / PIPELINE

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def evaluation_file(self) -> Path:
        return self.path / "evaluation" / "metrics.json"

    @property
    def benchmark_file(self) -> Path:
        return self.path / "evaluation" / "benchmark.json"

    @property
    def inputs_file(self) -> Path:
        return self.path / "inputs.json"

    @property
    def merge_plans_file(self) -> Path:
        return self.path / PLANS_FILE

    def validation_picture(self, step: int) -> Path:
        """The picture of samples that was taken while training, after so many steps."""
        return self.path / "validation" / f"step-{step:08d}.png"

    def find_step(self, checkpoint: str) -> RunFolder:
        """What was sampled of a checkpoint, by its step; of `latest` the last one of these.

        Raises:
            UserError: it is no number, or nothing was sampled of it.
        """
        steps = checkpoint_steps(self.steps)
        step = (steps or [0])[-1] if checkpoint == "latest" else as_step(checkpoint)
        if step not in steps:
            raise UserError(
                f"{self.path}: --checkpoint {checkpoint}: was not sampled; run `shd-diffusion sample {self.path} "
                f"--checkpoint {checkpoint}` first"
            )
        return self.at_step(step)

    def check(self, config: RunConfig, moved: bool = False) -> None:
        """See that the folder is free or holds a run of this config; nothing is written.

        Args:
            moved: what it reads may lie elsewhere by now; whether it is the same, `check_inputs` sees. What it may do
            without is given by both or by neither.

        Raises:
            UserError: the folder belongs to another config, or is no run folder.
        """
        check_ours(self.path, self.config_file.name)
        if not self.config_file.exists():
            return
        if self.pipeline == self.path:
            raise UserError(f"{self.path}: is a pipeline that `compress` made; give another --output")
        present = self.read_config()
        pair = (present, config)
        given = [{key for key in OPTIONAL if _flat(each).get(key) is not None} for each in pair]
        there, now = (_training_keys(each, given[0] ^ given[1] if moved else PLACES) for each in pair)
        for key in sorted(there.keys() | now.keys()):
            if there.get(key) != now.get(key):
                raise UserError(
                    f"{self.config_file}: this run belongs to another config (`{key}` is {there.get(key)!r} "
                    f"there, {now.get(key)!r} now); give another --output or delete the folder"
                )
        if config.train.max_steps < present.train.max_steps:
            raise UserError(
                f"{self.config_file}: this run goes on to step {present.train.max_steps}, so `train.max_steps` cannot "
                f"be {config.train.max_steps}; it may grow only"
            )

    def check_inputs(self, config: RunConfig, inputs: dict[str, str], some: bool = False) -> None:
        """See that a run goes on with what it began with.

        Args:
            config: tells where the inputs are.
            inputs: hashes, by the key of the config that names the data or the model.
            some: these are not all that it reads.

        Raises:
            UserError: something else lies there now.
        """
        if not self.inputs_file.exists():
            return
        began_with = read_as(self.inputs_file, dict[str, str])
        flat = _flat(config)
        for key in sorted(inputs if some else began_with.keys() | inputs.keys()):
            if key in began_with and inputs.get(key) != began_with[key]:  # earlier versions knew fewer
                place = flat.get(key) or flat.get(f"{key}.path")
                raise UserError(
                    f"{self.path}: what `{key}` names{f' ({place})' if place else ''} has changed since this run "
                    "began; bring it back, or give another --output"
                )

    def reads_elsewhere(self, config: RunConfig) -> bool:
        """Whether a config names other places than the run's own."""
        return _training_keys(self.read_config(), PLACES) != _training_keys(config, PLACES)

    def is_complete(self, config: RunConfig) -> bool:
        """Whether a run has taken all the steps that a config wants."""
        return self.summary_file.exists() and self.read_summary().steps == config.train.max_steps

    def is_evaluated(self) -> bool:
        """Whether there are metrics of what a finished run has come to; those from before it went on are of another
        model.

        Raises:
            UserError: a file is damaged.
        """
        if not (self.summary_file.exists() and self.evaluation_file.exists()):
            return False
        protocol = read_as(self.evaluation_file, dict[str, Any]).get("protocol", {})
        return is_of_step(protocol, self.read_summary().steps)

    def identity(self, config: RunConfig) -> str:
        """A hash of all that a run's weights follow from, as far as it is not the default: of a later version, which
        has more keys, it is the same."""
        return json_sha256(_training_keys(config, changed=True))

    def create(self, config: RunConfig, inputs: dict[str, str]) -> None:
        """Write the config, what identifies the inputs, and the environment, before a training or what is left of it.

        The environments of all sessions are kept: that of the first, and those that went on under `resumed`.

        Raises:
            UserError: the environment that is there is damaged.
        """
        environment = describe_environment()
        if first := self.read_environment():
            resumed = first.get("resumed")
            environment = {**first, "resumed": [*(resumed if isinstance(resumed, list) else []), environment]}
        self.write_config(config)
        if not self.inputs_file.exists():
            write_json(self.inputs_file, inputs)
        self.summary_file.unlink(missing_ok=True)  # of a run that was complete, and is extended
        write_json(self.environment_file, environment)
        self.checkpoints.mkdir(exist_ok=True)

    def read_environment(self) -> dict[str, Any]:
        """Where the run began, empty where it has not, and under `resumed` where it went on.

        Raises:
            UserError: the file is damaged.
        """
        if not self.environment_file.exists():
            return {}
        return read_as(self.environment_file, dict[str, Any], "delete it; it is made anew")

    def write_config(self, config: RunConfig) -> None:
        """Write the config, the first file of a folder; it may have other free keys than the one that is there."""
        text = dump_config(config)
        if not self.config_file.exists() or self.config_file.read_text(encoding="utf-8") != text:
            write_text(self.config_file, text)

    def log(self, entry: dict[str, Any]) -> None:
        """Append a line to the metrics."""
        with naming(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that a resumed run will take again, and damaged lines, such as a last one cut off."""
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, LookupError, TypeError, RecursionError):
                continue
        write_text(self.metrics_file, "".join(kept))

    def read_config(self) -> TrainTeacherConfig | DistillConfig:
        """The resolved config of the run.

        Raises:
            UserError: this is no run folder, or its config cannot be read.
        """
        if not self.config_file.is_file():
            raise UserError(
                f"{self.path}: no config.yaml in it, so it is not a run folder; give the folder of a run"
            )
        return read_run_config(self.config_file)

    def write_summary(self, summary: Summary) -> None:
        """Say that a run has ended, and with what."""
        write_json(self.summary_file, summary.model_dump(by_alias=True))

    def read_summary(self) -> Summary:
        """What training left behind.

        Raises:
            UserError: the training has not ended yet, or the file is damaged.
        """
        if not self.summary_file.exists():
            raise UserError(
                f"{self.path}: its training has not ended; run its command again to continue it, with --finish to save "
                "what its last checkpoint has, or give --checkpoint latest"
            )
        return read_as(self.summary_file, Summary)

    def finished_pipeline(self) -> Path:
        """The pipeline that training left behind.

        Raises:
            UserError: training has not ended yet, or the pipeline was deleted since.
        """
        self.read_summary()
        if not (self.pipeline / "model_index.json").is_file():
            raise UserError(
                f"{self.pipeline}: has no pipeline any more; the command of its training makes it anew from the last "
                "checkpoint"
            )
        return self.pipeline


def _flat(config: RunConfig, changed: bool = False) -> dict[str, Any]:
    """A config as `config.yaml` has it, by dotted key; `changed`: without what has its default."""
    return flatten(config.model_dump(mode="json", by_alias=True, exclude_defaults=changed))


def _training_keys(
    config: RunConfig, with_places: Collection[str] = (), changed: bool = False
) -> dict[str, Any]:
    """All that a run's weights follow from, by dotted key; where that lies only as far as wanted.

    Args:
        changed: leave out what has its default.
    """
    flat = _flat(config, changed)
    free = [key for key in (*FREE, *PLACES) if key not in with_places]
    return {
        key: value
        for key, value in flat.items()
        if not any(key == f or key.startswith(f"{f}.") for f in free)
    }
