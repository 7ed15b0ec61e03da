"""From a folder of images through latents to a pipeline that paints images again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml
from commands import TEACHER_CONFIG, command
from PIL import Image

from shd_diffusion.sampling import ClassConditionalPipeline


def test_a_model_trained_on_latents_samples_images(images: Path, vae: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    prepare = {
        "data": {"name": "image_folder", "path": str(images), "image_size": 8},
        "prepare": {"vae": str(vae), "batch_size": 2, "max_corrupt_share": 0.5},
    }
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(prepare))
    assert command("prepare", tmp_path / "prepare.yaml", "--output", cache)[0] == 0
    manifest = json.loads((cache / "manifest.json").read_text())
    channels, size, _ = manifest["shape"]

    config = yaml.safe_load(TEACHER_CONFIG.read_text())
    config["data"] = {"name": "latents", "path": str(cache)}
    config["model"]["arguments"] |= {
        "num_attention_heads": 2, "num_layers": 1, "in_channels": channels, "out_channels": channels,
        "sample_size": size, "num_embeds_ada_norm": manifest["num_classes"],
    }  # fmt: skip
    watch = {"every": 2, "num_images": 4, "num_inference_steps": 2}
    config["train"] |= {"max_steps": 2, "batch_size": 2, "watch": watch}
    config["sample"] |= {"num_images": 4, "num_inference_steps": 2, "batch_size": 4}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(config))
    run = tmp_path / "run"
    moved = vae.rename(tmp_path / "moved")
    code, _, errors = command("train-teacher", tmp_path / "teacher.yaml", "--output", run)
    moved.rename(vae)
    assert code == 2 and "key `data.path`: the VAE in its manifest.json" in errors and not run.exists()
    assert command("train-teacher", tmp_path / "teacher.yaml", "--output", run)[0] == 0
    assert ClassConditionalPipeline.from_pretrained(run / "pipeline").vae is not None
    assert command("sample", run)[0] == 0
    assert Image.open(run / "samples" / "000003.png").size == (8, 8)
    # what is watched while training are the images that the VAE paints, against those that the latents come from
    assert Image.open(run / "watch" / "step-00000002.png").size == (4 * 50 + 2, 52)
    (entry,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert math.isfinite(entry["watch"]["fid"])
