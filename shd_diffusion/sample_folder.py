"""A folder of samples: `000000.png` …, and what `sampling.json` says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from shd_diffusion.files import read_as

SUMMARY, METADATA = "sampling.json", "metadata.jsonl"


class Summary(BaseModel):
    """What `sampling.json` says of the images beside it; those from `num_images` on are of a call that has not ended,
    or of one that wanted more.

    Attributes:
        num_images: so many were asked for last, and are finished.
        labels: of these; None where they are not made by class.
        class_names: of the classes, by their numbers, where they have names.
        prompts: of these; None where they are not made from prompts.
        seconds_per_image: of the last call, in one process.
        protocol: what they depend on.
    """

    num_images: int = Field(0, ge=0)
    labels: list[int] | None = None
    class_names: dict[int, str] | None = None
    prompts: list[str] | None = None
    seconds_per_image: float = 0.0
    protocol: dict[str, Any] = {}


def read_summary(folder: Path) -> Summary | None:
    """What is known of the images in a folder; None where `sample` did not make them.

    Raises:
        UserError: its `sampling.json` is damaged.
    """
    path = folder / SUMMARY
    return read_as(path, Summary, "delete the folder and sample anew") if path.exists() else None


def image_path(folder: Path, index: int) -> Path:
    """Where image `index` is kept."""
    return folder / f"{index:06d}.png"
