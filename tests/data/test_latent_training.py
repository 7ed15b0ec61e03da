"""From a folder of images through latents to a pipeline that paints images again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import yaml
from commands import TEACHER_CONFIG, command
from diffusers import AutoencoderKL
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
    validation = {"every": 2, "num_images": 4, "num_inference_steps": 2}
    config["train"] |= {"max_steps": 2, "batch_size": 2, "validation": validation}
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
    # the validation's are the images that the VAE paints, against those that the latents come from
    assert Image.open(run / "validation" / "step-00000002.png").size == (4 * 50 + 2, 52)
    (entry,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert math.isfinite(entry["validation"]["fid"])

    # where the reference is given, the images that the latents come from are not needed
    config["evaluate"]["reference"] = str(tmp_path / "reference")
    (tmp_path / "reference").mkdir()
    for index in range(12):
        Image.new("RGB", (8, 8), (20 * index, 10, 0)).save(tmp_path / "reference" / f"{index}.png")
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(config))
    moved = images.rename(tmp_path / "moved")
    code, _, errors = command("train-teacher", tmp_path / "alone.yaml", "--output", tmp_path / "alone")
    moved.rename(images)
    assert code == 0, errors

    # a student on latents of another VAE, or on pixels, is none of this teacher's
    other = AutoencoderKL.from_pretrained(vae)
    with torch.no_grad():
        other.quant_conv.bias += 0.1
    other.save_pretrained(tmp_path / "other")
    prepare["prepare"]["vae"] = str(tmp_path / "other")
    (tmp_path / "prepare.yaml").write_text(yaml.safe_dump(prepare))
    assert command("prepare", tmp_path / "prepare.yaml", "--output", tmp_path / "others")[0] == 0
    student = {key: value for key, value in config.items() if key not in ("model", "diffusion")}
    student |= {"teacher": {"path": str(run)}, "student": config["model"]}
    student["data"] = {"name": "latents", "path": str(tmp_path / "others")}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(student))
    code, _, errors = command("distill", tmp_path / "student.yaml", "--output", tmp_path / "student")
    assert code == 2 and "student.yaml: key `teacher.path`" in errors and "encoded by another" in errors
    student["data"] = prepare["data"]
    student["student"]["arguments"] |= {"in_channels": 3, "out_channels": 3, "sample_size": 8}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(student))
    code, _, errors = command("distill", tmp_path / "student.yaml", "--output", tmp_path / "student")
    assert code == 2 and "student.yaml: key `teacher.path`" in errors
    assert not (tmp_path / "student").exists()
