"""The metrics of a run while it trains: lines of metrics.jsonl, and the same numbers in the trackers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from shd_diffusion.files import replacing_file
from shd_diffusion.protocol import flatten
from shd_diffusion.run_folder import RunFolder


class MetricsLogger:
    """The metrics of a run from step `start` on. Every process calls it; the main one writes."""

    def __init__(self, run: RunFolder, accelerator: Accelerator, batch_size: int, start: int) -> None:
        self.run, self.accelerator, self.batch_size = run, accelerator, batch_size
        self._lap = time.perf_counter(), start

    def entry(
        self,
        done: int,
        terms: dict[str, Tensor],
        weights: dict[str, float],
        norm: Tensor,
        learning_rate: float,
        shd_by_block: dict[str, Tensor],
    ) -> dict[str, Any]:
        """The entry of a step that was taken: every term, SHD's block by block, the seconds a step since the last."""
        began, logged = self._lap
        return {
            **self._head(done),
            **summarize_terms(self._means(terms), weights),
            **({"shd_by_block": self._means(shd_by_block)} if shd_by_block else {}),
            "learning_rate": learning_rate,
            "gradient_norm": float(norm),
            "seconds_per_step": (time.perf_counter() - began) / (done - logged),
        }

    def log(self, entry: dict[str, Any]) -> None:
        """Write an entry, and start the next lap."""
        if self.accelerator.is_main_process:
            self.run.log(entry)
        numbers = {key: value for key, value in flatten(entry).items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=entry["step"])
        self._lap = time.perf_counter(), entry["step"]

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Context whose time is no step's."""
        began = time.perf_counter()
        yield
        start, step = self._lap
        self._lap = start + time.perf_counter() - began, step

    def log_image(self, done: int, picture: Tensor) -> None:
        """Keep a picture of samples, 8-bit (H, W, 3), in the run folder and the trackers."""
        if not self.accelerator.is_main_process:
            return
        pixels = picture.numpy()
        with replacing_file(self.run.validation_picture(done)) as temporary:
            Image.fromarray(pixels).save(temporary, format="png")
        for tracker in self.accelerator.trackers:
            # Channels come first for TensorBoard unless it is told otherwise, and last for all others.
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels[None]}, step=done, **layout)

    def log_skipped(self, done: int, terms: dict[str, Tensor]) -> list[str]:
        """Write which terms caused a step to be left out, and return them; `gradient` where all were finite."""
        values = self._means(terms)
        culprits = [name for name, value in values.items() if not math.isfinite(value)] or ["gradient"]
        self.log({**self._head(done), "skipped": culprits})
        return culprits

    def _head(self, done: int) -> dict[str, int]:
        return {"step": done, "images": done * self.batch_size}

    def _means(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Means over the processes."""
        means = self.accelerator.reduce(torch.stack([*terms.values()]), "mean")
        return dict(zip(terms, means.tolist(), strict=True))


def summarize_terms(values: dict[str, float], weights: dict[str, float]) -> dict[str, Any]:
    """Every term unweighted, weighted, and as a share of the loss, so that none dwarfs the others unnoticed."""
    weighted = {name: weights[name] * value for name, value in values.items()}
    loss = sum(weighted.values())
    terms = {
        name: {
            "value": values[name],
            "weighted": weighted[name],
            "share": weighted[name] / loss if loss else 0.0,
        }
        for name in values
    }
    return {"loss": loss, "terms": terms}
