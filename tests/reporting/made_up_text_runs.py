"""Run folders of text-to-image models, made up but of the right shape: coloured discs and squares by prompt."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.numpy import save_file

from .made_up_runs import GROUPS, softmax, write, write_log

HOSTILE = [
    "<script>alert('x')</script> & \"quotes\"",
    "a very long prompt, " * 40 + "at last its end",
    "🐈‍⬛ under a 🌈, emoji style",
    "חתול אדום יושב על שטיח\u202e reversed",
    "two\nlines\x07 and a bell",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 3,
]
PLAIN = [
    f"a {colour} {shape}" for colour in ("red", "green", "blue", "orange") for shape in ("disc", "square")
]
PROMPTS = [*PLAIN, *HOSTILE]
WORDS = ["<|startoftext|>", "a", "red", "disc", "on", "<b>&", "אדום", "🐈", "<|endoftext|>"]
TEXT, GRID = 12, (6, 8)


def make_text_run(folder: Path, noise: float, prompts: list[str] | None = None, images: int = 28) -> Path:
    """A complete run of a text-to-image model; the student's maps and images are the noisier the larger `noise`."""
    folder.mkdir(parents=True)
    prompts = PROMPTS if prompts is None else prompts
    rng = np.random.default_rng(round(1000 * noise))
    teacher = folder.name == "teacher"
    config: dict[str, Any] = {"seed": 0, "data": {"name": "image_folder"}, "train": {"max_steps": 600}}
    if not teacher:
        config["losses"] = {"shd": {"weight": 1.0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = {
        "name": folder.name, "class": "PixArtTransformer2DModel", "blocks": 3, "steps": 600, "images": 76_800,
        "stage": "train-teacher" if teacher else "distill", "parameters": 900_000 if teacher else 400_000,
        "heads": 12 if teacher else 5, "teacher_heads": None if teacher else 12,
    }  # fmt: skip
    write(folder / "summary.json", summary)
    terms = ["denoise"] if teacher else ["denoise", "shd"]
    write_log(folder / "metrics.jsonl", terms, 300 * noise, rng, blocks=3)
    told = [prompts[index % len(prompts)] for index in range(images)]
    sampling = {
        "num_images": images,
        "prompts": told,
        "seconds_per_image": 0.8,
        "protocol": {"seed": 0, "scheduler": "x"},
    }
    write(folder / "samples" / "sampling.json", sampling)
    for index, prompt in enumerate(told):
        picture_of(prompt, index, noise).save(folder / "samples" / f"{index:06d}.png")
    metrics = {
        "cmmd": 0.4 + noise, "clip_score": 31.234 - 10 * noise, "r_precision": 0.8 - noise,
        "r_precision_low": 0.7, "r_precision_high": 0.9,
        "protocol": {"seed": 0, "scheduler": "x", "clip_model": "tiny"},
        **({} if teacher else {"against_teacher": against_teacher(noise)}),
    }  # fmt: skip
    write(folder / "evaluation" / "metrics.json", metrics)
    if not teacher:
        write_word_attention(folder / "attention.safetensors", noise)
    return folder


def against_teacher(noise: float) -> dict[str, Any]:
    """What the evaluation of a student says of its teacher."""
    means = {"latent_mse": 0.5 * noise, "latent_relative_mse": noise, "feature_cosine": 1 - noise}
    return {
        **{key: {"mean": m, "low": 0.9 * m, "high": 1.1 * m, "n": 8} for key, m in means.items()},
        "indices": list(range(8)),
        "per_image": {key: [m] * 8 for key, m in means.items()},
        "protocol": {"teacher_sha256": "ab" * 32, "seed": 0, "features": "clip"},
        "notes": ["LPIPS is left out: its weights are not here"],
    }


def picture_of(prompt: str, index: int, noise: float) -> Image.Image:
    """48 pixels high, 64 wide."""
    image = Image.new("RGB", (64, 48), "#eeeae2")
    some = f"#{zlib.crc32(prompt.encode()) & 0xFFFFFF:06x}"
    colour = next((name for name in ("red", "green", "blue", "orange") if name in prompt), some)
    draw, box = ImageDraw.Draw(image), (18, 10, 46, 38)
    (draw.ellipse if "disc" in prompt else draw.rectangle)(box, fill=colour)
    pixels = np.asarray(image, float) + np.random.default_rng(index).normal(0, 255 * noise, (48, 64, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_word_attention(path: Path, noise: float, words: bool = True, samples: int = 4) -> None:
    """Self-attention, cross-attention and joint attention of 12 heads squeezed to 5; `disc` gets the middle."""
    rng, own = np.random.default_rng(3), np.random.default_rng(round(1000 * noise))
    patches = GRID[0] * GRID[1]
    rows, columns = np.divmod(np.arange(patches), GRID[1])
    middle = np.exp(-((rows - 2.5) ** 2 + (columns - 3.5) ** 2) / 4)
    about = np.zeros((patches, TEXT))
    about[:, 0], about[:, 2], about[:, 3], about[:, 4] = 2.5, 2 * middle, 4 * middle, 3 * (1 - middle)
    tensors: dict[str, NDArray[Any]] = {}
    blocks = []
    layout = {
        "a.attn1": (patches, None),
        "a.attn2": (TEXT, [0, TEXT]),
        "b.attn": (patches + TEXT, [patches, None]),
    }
    for name, (keys, text) in layout.items():
        logits = rng.normal(0, 0.7, (12, patches, keys))
        if text:
            text = [text[0], text[0] + TEXT]
            logits[:, :, text[0] : text[1]] += about
            logits[:, :, text[1] - 2 :] = -1e9  # padding
        teacher = softmax(logits)
        weights = np.zeros((samples, 5, 12))
        for n, heads in enumerate(GROUPS):
            weights[:, n, list(heads)] = 1 / len(heads)
        squeezed = np.einsum("nm,mqk->nqk", weights[0], teacher)
        student = softmax(np.log(squeezed + 1e-30) + own.normal(0, 3 * noise, squeezed.shape))
        tensors |= {
            f"{name}/teacher": teacher, f"{name}/squeezed": squeezed, f"{name}/student": student,
            f"{name}/coefficients": np.full((samples, 7), 0.5), f"{name}/weights": weights,
            f"{name}/residual": rng.gamma(9, 0.035, (samples, 5)),
            f"{name}/divergence": own.gamma(5, 0.04, (samples, 5)),
        }  # fmt: skip
        if text:
            for part in ("teacher", "squeezed", "student"):
                of_text = tensors[f"{name}/{part}"][:, :, text[0] : text[1]].mean(axis=0)
                tensors[f"{name}/{part}_text"] = of_text.T.reshape(TEXT, *GRID)
        kind = "self" if text is None else "cross" if keys == TEXT else "joint"
        blocks.append({"student": name, "teacher": name, "kind": kind})
    tensors["image"] = np.asarray(picture_of("a red disc", 0, 0)).transpose(2, 0, 1) / 127.5 - 1
    keys_of = [[0], [1], [2], [3], [4, 5], [6], [7], [8], [9]]
    told = [{"text": t, "encoder": "text_encoder", "keys": k} for t, k in zip(WORDS, keys_of, strict=True)]
    description = {
        "label": None, "timestep": 250, "prompt": "a red disc on <b>& אדום 🐈" if words else None,
        "words": told if words else None, "blocks": blocks,
    }  # fmt: skip
    save_file(
        {key: np.ascontiguousarray(value, dtype=np.float32) for key, value in tensors.items()},
        path,
        metadata={"description": json.dumps(description)},
    )
