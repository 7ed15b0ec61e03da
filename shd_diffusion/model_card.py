"""README.md of a run's pipeline: the model card that a hub shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shd_diffusion.config import DistillConfig, RunConfig, dump_config
from shd_diffusion.files import read_as, write_text
from shd_diffusion.models.factory import denoiser_part
from shd_diffusion.protocol import flatten
from shd_diffusion.run_folder import RunFolder
from shd_diffusion.settings_table import protocol_line
from shd_diffusion.summary import Summary

CARD = """---
library_name: diffusers
tags:
- diffusion
{tags}---

# {name}

{what}

```python
{use}
```

## How it was made

{made}

```sh
{command}
```

<details><summary>config.yaml</summary>

```yaml
{config}```

</details>

## How good it is

{metrics}

## Licence

{licence}
"""
BY_CLASS = """from diffusers import DiffusionPipeline
{imports}
pipeline = DiffusionPipeline.from_pretrained("{path}"{code})
images = pipeline({asked}, num_inference_steps=25).images"""
OWN_CODE = ', custom_pipeline="pipeline", trust_remote_code=True'  # the pipeline.py in the folder
BY_OWN_CLASS = """{imports}from shd_diffusion.sampling import ClassConditionalPipeline

pipeline = ClassConditionalPipeline.from_pretrained("{path}")
images = pipeline({asked}, num_inference_steps=25).images"""
BY_PROMPT = """import torch
from diffusers import DiffusionPipeline
{imports}
pipeline = DiffusionPipeline.from_pretrained("{path}", torch_dtype=torch.float32)
image = pipeline("a cat").images[0]"""
OF_CLASSES = ("num_embeds_ada_norm", "num_classes", "num_class_embeds")
OWN_CLASSES = "import shd_diffusion.models  # pip install shd-diffusion: classes that diffusers has not\n"
UNKNOWN = "Not evaluated yet: `shd-diffusion sample {run}`, then `shd-diffusion evaluate {run}`."
QUANTISED = """

The weights of its linear layers are floats that take 255 values a row, as `load_in_8bit` of bitsandbytes has
them; it was trained to have its features rounded too, token by token. Here they are not: a library of 8-bit kernels
has to load it for that."""
LICENCE = "That of the {teacher}data it was trained on; shd-diffusion does not know them."


def write_card(run: RunFolder) -> Path:
    """Write the card of a finished run, with its metrics where there are some.

    Raises:
        UserError: the run is not finished, or a file in it is damaged.
    """
    file = run.pipeline / "README.md"
    write_text(file, card(run))
    return file


def card(run: RunFolder, name: str | None = None) -> str:
    """The text of a finished run's card; see `write_card`.

    Args:
        name: by which its pipeline is loaded; None: its folder.
    """
    config, summary = run.read_config(), run.read_summary()
    environment = read_as(run.environment_file, dict[str, Any])
    metrics = read_as(run.evaluation_file, dict[str, Any]) if run.is_evaluated() else None
    teacher = config.teacher.path if isinstance(config, DistillConfig) else None
    return CARD.format(
        name=summary.name,
        tags="- squeezing-heads-distillation\n" if teacher else "",
        what=_what(summary, teacher),
        use=_use(run, str(run.pipeline) if name is None else name),
        made=_made(config, summary),
        command=environment.get("command"),
        config=dump_config(config),
        metrics=UNKNOWN.format(run=run.path) if metrics is None else _metrics(metrics),
        licence=LICENCE.format(teacher="teacher and of the " if teacher else ""),
    )


def _what(summary: Summary, teacher: str | None) -> str:
    size = f"A {summary.class_name} of {summary.parameters:,} parameters and {summary.heads} attention heads"
    if teacher is None:
        return f"{size}."
    return f"{size}, distilled from `{teacher}`, which has {summary.teacher_heads} heads."


def _use(run: RunFolder, name: str) -> str:
    index = read_as(run.pipeline / "model_index.json", dict[str, Any])
    libraries = [str(part[0]) for part in index.values() if isinstance(part, list) and part]
    imports = OWN_CLASSES if any(each.startswith("shd_diffusion.models") for each in libraries) else ""
    if index.get("_class_name") not in ("ClassConditionalPipeline", "DiTPipeline"):
        return BY_PROMPT.format(imports=imports, path=name)
    ours = index["_class_name"] == "ClassConditionalPipeline"
    alone = not ours or (run.pipeline / "pipeline.py").exists()
    return (BY_CLASS if alone else BY_OWN_CLASS).format(
        imports=imports, path=name, code=OWN_CODE if ours else "", asked=_asked(run, index)
    )


def _asked(run: RunFolder, index: dict[str, Any]) -> str:
    """The arguments for two images: of the first classes, by their names where they have some, or of none."""
    if names := list((index.get("id2label") or {}).values())[:2]:
        return f"pipeline.get_label_ids({json.dumps([name.split(',')[0].strip() for name in names])})"
    part = run.pipeline / str(denoiser_part(index)) / "config.json"
    config = read_as(part, dict[str, Any])
    by_class = (
        any(config.get(key) for key in OF_CLASSES) or config.get("encoder_hid_dim_type") == "image_proj"
    )
    return "class_labels=[0, 1]" if by_class else "num_images=2"


def _made(config: RunConfig, summary: Summary) -> str:
    weights = _asked_for(config) if summary.losses is None else summary.losses
    told = ", ".join(f"{name} ({weight:g})" for name, weight in weights.items())
    return (
        f"{summary.steps:,} steps of {config.train.batch_size} images of `{config.data.name}`; "
        f"its weights are averages with decay {config.train.ema_decay:g}. "
        f"Losses and their weights: {told or 'denoise (1)'}."
        f"{QUANTISED if isinstance(config, DistillConfig) and config.student.quantise else ''}"
    )


def _asked_for(config: RunConfig) -> dict[str, float]:
    """The weights of the terms in a config, not all of which need have counted."""
    losses = flatten(config.model_dump(mode="json", by_alias=True).get("losses", {}))
    return {
        key.removesuffix(".weight"): value
        for key, value in losses.items()
        if key.endswith(".weight") and value
    }


def _metrics(metrics: dict[str, Any]) -> str:
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    rows = "\n".join(f"| {key} | {value:.5g} |" for key, value in numbers.items())
    return f"| metric | value |\n|---|---:|\n{rows}\n\n{protocol_line([metrics.get('protocol', {})])}"
