"""Tiny text-to-image pipelines of which nothing but the config files is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tiny_pipelines import ARGUMENTS, PIPELINES, SIZE

HALF: dict[str, dict[str, Any]] = {
    "sd1.5": {"attention_head_dim": 2},
    "sdxl": {"attention_head_dim": 2},
    "pixart-sigma": {"num_attention_heads": 2, "cross_attention_dim": 24},
    "sd3.5": {"num_attention_heads": 2, "caption_projection_dim": 16},
    "flux-dev": {"num_attention_heads": 2},
}
"""What a student with half of its teacher's heads has otherwise."""


def config_only(name: str, folder: Path) -> Path:
    """The configs of a tiny pipeline of 4 heads, without any weights, and a run's config beside them."""
    pipeline = PIPELINES[name]()
    pipeline.save_pretrained(folder / "teacher", safe_serialization=True)
    for file in (folder / "teacher").rglob("*"):
        if file.is_file() and file.name not in ("config.json", "model_index.json", "scheduler_config.json"):
            file.unlink()
    guidance = {"guidance_range": [1, 4]} if name == "flux-dev" else {}
    tree = {
        "teacher": {"path": str(folder / "teacher")},
        "student": {"arguments": HALF[name]},
        "data": {"name": "image_folder", "path": "nowhere", "image_size": SIZE[0], "caption_column": "text"},
        "prepare": {"output": str(folder / "cache"), "prompt_arguments": ARGUMENTS.get(name, {})},
        "train": {"max_steps": 3, "batch_size": 2, **guidance},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder / "config.yaml"
