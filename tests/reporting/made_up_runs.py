"""Run folders as training, sampling and evaluation leave them, made up but of the right shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file
from sklearn.datasets import load_digits

FIDS = {"teacher": 38.2, "none": 440.1, "kd": 389.7, "kd-shd": 104.3}
BLOCKS = 3
SAMPLED = {
    "seed": 0,
    "num_inference_steps": 25,
    "scheduler": "DDIMScheduler",
    "guidance_scale": 1.0,
}
PROTOCOL = {
    **SAMPLED,
    "features": "digits-classifier",
    "extractor_sha256": "ab12" * 16,
    "num_images": 40,
    "reference": "digits",
}
GROUPS = [(0, 1, 2, 3), (4, 5), (6, 7), (8, 9), (10, 11)]


def make_run(folder: Path, fid: float, blocks: int = BLOCKS) -> Path:
    """A complete run folder; without SHD's term and attention for a teacher."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(round(fid))
    teacher = folder.name == "teacher"
    terms = {"teacher": ["denoise"], "none": ["denoise"], "kd": ["denoise", "output"]}.get(
        folder.name, ["denoise", "output", "shd"]
    )
    config: dict[str, Any] = {"seed": 0, "data": {"name": "digits"}, "train": {"max_steps": 600}}
    config["model" if teacher else "student"] = {"class": "DiTTransformer2DModel"}
    if not teacher:
        config["losses"] = {"shd": {"weight": 5.0 * ("shd" in terms)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {
        "name": folder.name, "stage": "train-teacher" if teacher else "distill",
        "class": "DiTTransformer2DModel", "parameters": 1_243_000 if teacher else 261_000,
        "heads": 12 if teacher else 5, "blocks": blocks, "head_dim": 8, "steps": 600, "images": 76_800,
        "teacher": None if teacher else "runs/teacher",
        "teacher_heads": None if teacher else 12,
    }  # fmt: skip
    write(folder / "summary.json", summary)
    command = f"shd-diffusion {summary['stage']} configs/digits/{folder.name}.yaml"
    environment = {
        "versions": {"torch": "2.14.1"}, "machine": {"cores": 2}, "commit": None,
        "command": command, "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    write(folder / "environment.json", environment)
    write_log(folder / "metrics.jsonl", terms, fid, rng, blocks)
    write_samples(folder / "samples", fid)
    figures = {
        "fid": fid, "inception_score_mean": 9 - fid / 100, "inception_score_std": 0.11,
        "kid_mean": fid / 40, "kid_std": 0.2, "precision": 0.9 - fid / 1000, "recall": 0.85 - fid / 900,
        "label_accuracy": 0.97 - fid / 900,
        "per_class_fid": {str(label): fid * (1 + 0.1 * label) for label in range(10)},
        "protocol": PROTOCOL, "warnings": [],
    }  # fmt: skip
    write(folder / "evaluation" / "metrics.json", figures)
    write_benchmark(folder / "evaluation" / "benchmark.json", 1.0 if teacher else 0.25)
    write_nearest(folder / "evaluation")
    if not teacher:
        write_attention(folder / "attention.safetensors", 1 - fid / 500, blocks)
    return folder


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_log(path: Path, terms: list[str], fid: float, rng: np.random.Generator, blocks: int) -> None:
    """60 logged steps with a decaying, noisy loss; the validation at four of them."""
    lines = []
    for step in range(10, 601, 10):
        level = 0.05 + np.exp(-step / 120)
        values = {term: level * rng.lognormal(0, 0.15) / (1 + i) for i, term in enumerate(terms)}
        total = sum(values.values())
        entry = {
            "step": step, "images": step * 128, "loss": total, "learning_rate": 2e-3, "seconds_per_step": 0.1,
            "gradient_norm": 0.4,
            "terms": {term: {"value": v, "weighted": v, "share": v / total} for term, v in values.items()},
        }  # fmt: skip
        if "shd" in terms:
            entry["shd_by_block"] = {
                f"transformer_blocks.{i}.attn1": values["shd"] * 3**i * 3 / 13 for i in range(blocks)
            }
        if step % 150 == 0:
            entry["validation"] = {"fid": fid * (1 + 300 / step)}
        lines.append(json.dumps(entry))
    path.write_text("\n".join(lines) + "\n")


def write_samples(folder: Path, fid: float) -> None:
    """40 real digits, the noisier the larger the distance."""
    digits = load_digits()
    folder.mkdir()
    labels = [index % 10 for index in range(40)]
    for index, label in enumerate(labels):
        rng = np.random.default_rng(index)
        image = digits.images[digits.target == label][index] / 16 + rng.normal(0, fid / 1500, (8, 8))
        pixels = (image.clip(0, 1) * 255).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").save(folder / f"{index:06d}.png")
    sampling = {
        "num_images": 40, "labels": labels, "seconds": 0.17, "seconds_per_image": 0.17 / 40 + fid * 1e-6,
        "protocol": SAMPLED,
    }  # fmt: skip
    write(folder / "sampling.json", sampling)


def write_benchmark(path: Path, size: float) -> None:
    """The teacher's costs, times a size; an image at once takes 200 ms of the teacher, and four 400."""
    timings = [
        {
            "what": what, "batch_size": batch, "per_second": batch / seconds, "peak_bytes": int(4e6 * size * batch),
            "seconds": {"median": seconds, "quartiles": [0.9 * seconds, 1.1 * seconds]},
            "ratio": {"median": size, "quartiles": [size, size]},
        }
        for what, batch, seconds in (
            ("call", 1, 8e-3 * size), ("image", 1, 0.2 * size), ("call", 4, 16e-3 * size), ("image", 4, 0.4 * size),
        )
    ]  # fmt: skip
    how = {"first": "teacher", "device": "cpu", "memory": "counted", "threads": 2, "rounds": 5}
    sampling = {"num_inference_steps": 25, "dtype": "float32", "attention": None, "compile": False}
    found = {
        "benchmark": how | {"sampling": sampling}, "environment": {"started": "2026-01-01T00:00:00+00:00"},
        "macs_call": int(11e6 * size), "macs_image": int(275e6 * size), "calls_per_image": 25, "timings": timings,
    }  # fmt: skip
    write(path, found)


def write_nearest(folder: Path) -> None:
    """Eight samples with two neighbours each; every image is of one colour, which tells which it is."""
    picture = np.zeros((8, 8, 3, 6, 3), np.uint8)  # a row and a column of images 8 high and 6 wide
    entries = []
    for row in range(8):
        for column in range(3):
            picture[row, :, column] = (20 * row, 100 * column, 50)
        nearest = [
            {
                "index": 7 * row + k,
                "name": f"digits: image {7 * row + k}",
                "label": row,
                "distance": row + 2 * k,
            }
            for k in (1, 2)
        ]
        entries.append({"index": 5 * row, "label": row, "spacing": 4.0 * (row > 0), "nearest": nearest})
    Image.fromarray(picture.reshape(64, 18, 3)).save(folder / "nearest.png")
    write(folder / "nearest.json", {"reference": "digits", "num_reference_images": 1797, "samples": entries})


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def write_attention(path: Path, closeness: float, blocks: int, samples: int = 32, tokens: int = 16) -> None:
    """Maps of a teacher with 12 heads squeezed to 5; the student's are a mixture of those and of its own."""
    rng = np.random.default_rng(7)
    own = np.random.default_rng(round(closeness * 1000))
    place = np.stack(np.divmod(np.arange(tokens), 4), -1)
    near = -np.linalg.norm(place[:, None] - place[None], axis=-1)
    tensors: dict[str, NDArray[Any]] = {}
    names = [f"transformer_blocks.{i}.attn1" for i in range(blocks)]
    for name in names:
        teacher = softmax(rng.normal(0, 1.2, (12, tokens, tokens)) + near * rng.uniform(0, 2, (12, 1, 1)))
        alpha = rng.normal(0.5, 0.1, (samples, 7)).clip(0, 1)
        weights = np.zeros((samples, 5, 12))
        for n, heads in enumerate(GROUPS):
            part = rng.dirichlet(np.full(len(heads), 20), samples)
            weights[:, n, list(heads)] = part
        squeezed = np.einsum("nm,mqk->nqk", weights[0], teacher)
        student = softmax(np.log(squeezed) * closeness + own.normal(0, 1, squeezed.shape) * (1 - closeness))
        tensors |= {
            f"{name}/teacher": teacher, f"{name}/squeezed": squeezed, f"{name}/student": student,
            f"{name}/coefficients": alpha, f"{name}/weights": weights,
            f"{name}/residual": rng.gamma(9, 0.035, (samples, 5)),
            f"{name}/divergence": own.gamma(5, 0.04 * (1.05 - closeness), (samples, 5)),
        }  # fmt: skip
    tensors["image"] = load_digits().images[13][None] / 8 - 1
    described = [{"student": name, "teacher": name, "kind": "self"} for name in names]
    description = {"label": 3, "timestep": 250, "blocks": described}
    save_file(
        {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in tensors.items()},
        path,
        metadata={"description": json.dumps(description)},
    )
