"""A run is a folder: config, environment, metrics, checkpoints and what came out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shd_diffusion.config import DistillConfig, RunConfig, TrainTeacherConfig, dump_config, read_run_config
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.files import read_json, write_json, write_text
from shd_diffusion.protocol import flatten

# What a run may be given anew without becoming another run: where it is, how its data are read, and what
# happens after training.
NOT_TRAINING = ("output", "data.num_workers", "data.verify", "sample", "evaluate")


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
    def attention_file(self) -> Path:
        return self.path / "attention.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def pipeline(self) -> Path:
        return self.path / "pipeline"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def evaluation_file(self) -> Path:
        return self.path / "evaluation" / "metrics.json"

    def watched(self, step: int) -> Path:
        """The picture of samples that was taken while training, after so many steps."""
        return self.path / "watch" / f"step-{step:08d}.png"

    def check(self, config: RunConfig) -> None:
        """See that the folder is free or holds a run of this config; nothing is written.

        Raises:
            UserError: the folder belongs to another config, or is no run folder.
        """
        if not self.config_file.exists():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(
                    f"{self.path}: holds files but no config.yaml of a run; give another --output"
                )
            return
        present, wanted = (
            flatten(self.read_config().model_dump(mode="json", by_alias=True)),
            flatten(config.model_dump(mode="json", by_alias=True)),
        )
        for key in sorted(present.keys() | wanted.keys()):
            if _concerns_training(key) and present.get(key) != wanted.get(key):
                raise UserError(
                    f"{self.config_file}: this run belongs to another config (`{key}` is {present.get(key)!r} "
                    f"there, {wanted.get(key)!r} now); give another --output or delete the folder"
                )

    def create(self, config: RunConfig) -> None:
        """Write the config and the environment, if they are not there yet."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        if not self.config_file.exists():
            write_json(self.path / "environment.json", describe_environment())
            write_text(self.config_file, dump_config(config))

    def log(self, entry: dict[str, Any]) -> None:
        """Append a line to the metrics."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that a resumed run will take again, and a last line that was cut off."""
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                break
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

    def read_summary(self) -> dict[str, Any]:
        """What training left behind.

        Raises:
            UserError: the training has not ended yet.
        """
        if not self.summary_file.exists():
            raise UserError(f"{self.path}: its training has not ended; run its command again to continue it")
        return read_json(self.summary_file)


def _concerns_training(key: str) -> bool:
    return not any(key == part or key.startswith(f"{part}.") for part in NOT_TRAINING)
