"""README.md of a run's pipeline: the model card that a hub shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from shd_diffusion.config import DistillConfig, RunConfig, dump_config
from shd_diffusion.files import read_as, write_text
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
BY_CLASS = """{imports}from shd_diffusion.sampling import ClassConditionalPipeline

pipeline = ClassConditionalPipeline.from_pretrained("{path}")
images = pipeline(class_labels=[0, 1], num_inference_steps=25).images"""
BY_PROMPT = """from diffusers import DiffusionPipeline
{imports}
pipeline = DiffusionPipeline.from_pretrained("{path}")
image = pipeline("a cat").images[0]"""
OWN_CLASSES = "import shd_diffusion.models  # pip install shd-diffusion: the class of its denoiser\n"
UNKNOWN = "Not evaluated yet: `shd-diffusion sample {run}`, then `shd-diffusion evaluate {run}`."
LICENCE = "That of the {teacher}data it was trained on; shd-diffusion does not know them."


def write_card(run: RunFolder) -> Path:
    """Write the card of a finished run, with its metrics where there are some.

    Raises:
        UserError: the run is not finished, or a file in it is damaged.
    """
    file = run.pipeline / "README.md"
    write_text(file, card(run))
    return file


def card(run: RunFolder) -> str:
    """The text of a finished run's card; see `write_card`."""
    config, summary = run.read_config(), run.read_summary()
    environment = read_as(run.path / "environment.json", dict[str, Any])
    metrics = read_as(run.evaluation_file, dict[str, Any]) if run.evaluation_file.exists() else None
    teacher = config.teacher.path if isinstance(config, DistillConfig) else None
    return CARD.format(
        name=summary.name,
        tags="- squeezing-heads-distillation\n" if teacher else "",
        what=_what(summary, teacher),
        use=_use(run, summary.class_name),
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


def _use(run: RunFolder, model_class: str) -> str:
    index = read_as(run.pipeline / "model_index.json", dict[str, Any])
    imports = "" if hasattr(diffusers, model_class) else OWN_CLASSES
    by_class = index.get("_class_name") == "ClassConditionalPipeline"
    return (BY_CLASS if by_class else BY_PROMPT).format(imports=imports, path=run.pipeline)


def _made(config: RunConfig, summary: Summary) -> str:
    losses = flatten(config.model_dump(mode="json", by_alias=True).get("losses", {}))
    weights = {
        key.removesuffix(".weight"): value
        for key, value in losses.items()
        if key.endswith(".weight") and value
    }
    told = ", ".join(f"{name} ({weight:g})" for name, weight in weights.items())
    return (
        f"{summary.steps:,} steps of {config.train.batch_size} images of `{config.data.name}`; "
        f"its weights are averages with decay {config.train.ema_decay:g}. "
        f"Losses and their weights: {told or 'denoise (1)'}."
    )


def _metrics(metrics: dict[str, Any]) -> str:
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    rows = "\n".join(f"| {key} | {value:.5g} |" for key, value in numbers.items())
    return f"| metric | value |\n|---|---:|\n{rows}\n\n{protocol_line([metrics.get('protocol', {})])}"
