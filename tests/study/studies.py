"""Small studies, and workers that stand in for those of real ones."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from commands import DISTILL_CONFIG

STEPS = {
    "train.max_steps": 10, "train.batch_size": 8, "train.checkpoint_every": 5, "train.log_every": 5,
    "train.validation.every": 5, "train.validation.num_images": 24, "train.validation.num_inference_steps": 2,
    "sample.num_images": 24, "sample.num_inference_steps": 2,
}  # fmt: skip


def study_file(folder: Path, teacher: Path, **changes: object) -> Path:
    path = folder / "study.yaml"
    tree = {
        "title": "Two variants, two seeds",
        "distill": str(DISTILL_CONFIG),
        "output": str(folder / "study"),
        "overrides": {**STEPS, "teacher.path": str(teacher)},
        "variants": {"kd": {"losses.shd.weight": 0}, "vkd": {"losses.shd.weight": 0, "losses.vkd.weight": 1}},
        "reference": "kd",
        "seeds": [0, 1],
        "targets": [1e6, 0],
        "after_seconds": [1e6],
    }
    path.write_text(yaml.safe_dump(tree | changes))
    return path


def stand_in(code: int, says: str = "") -> tuple[str, ...]:
    """A worker that does nothing but end with this exit code."""
    return sys.executable, "-c", f"print({says!r}); raise SystemExit({code})"


def in_turn(*codes: int, folder: Path, says: str = "") -> tuple[str, ...]:
    """Workers: the first to begin ends with the first code at once, the next with the next one a second later."""
    script = f"""
import pathlib, sys, time
taken = pathlib.Path({str(folder)!r})
taken.mkdir(exist_ok=True)
number = next(n for n in range(99) if not (taken / str(n)).exists())
(taken / str(number)).touch()
time.sleep(number)
print({says!r} if {codes!r}[number] else "")
(taken / str(number)).write_text("ended")
raise SystemExit({codes!r}[number])
"""
    return sys.executable, "-c", script
