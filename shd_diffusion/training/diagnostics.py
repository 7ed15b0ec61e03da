"""Teacher and student side by side outside of the training steps: calibration, and the report's attention maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.attention.blocks import text_keys
from shd_diffusion.data import Source
from shd_diffusion.files import save_tensors
from shd_diffusion.losses.padding import with_text_mask
from shd_diffusion.losses.shd import SHD
from shd_diffusion.losses.term import Batch, Records
from shd_diffusion.losses.token_grid import grid_shape
from shd_diffusion.models.denoiser import Condition, predict_frozen
from shd_diffusion.models.forward_process import ForwardProcess
from shd_diffusion.processes import processes
from shd_diffusion.training.batches import (
    BatchLayout,
    NoiseSettings,
    StepSampler,
    draw_noise,
    grouped_step_indices,
    make_batch,
)
from shd_diffusion.training.shown_sample import ShownPrompt, picture, shown_prompt

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
STUDY_IMAGES = 32
# elements of the teacher's maps of one block; as many again are squeezed, and the student's
MAPS_AT_ONCE = 2**27


def probe_batches(
    source: Source,
    process: ForwardProcess,
    null: Condition,
    device: torch.device,
    count: int,
    size: int,
    seed: int,
) -> Iterator[Batch]:
    """Noised batches that no training step sees, with conditions that are never dropped.

    The timesteps go round the schedule by the golden ratio, from a quarter of it, so that any number covers it evenly.
    """
    settings = NoiseSettings(source.shape, latent_noise=source.needs_noise)
    items = source.batches(StepSampler(seed, source.groups, BatchLayout(size), 0, count))
    for batch, raw in enumerate(items):
        of_these = replace(settings, shape=source.shape_of(raw))
        noise = draw_noise(seed, -1 - batch, range(size), of_these)  # negative steps: noise of their own
        places = torch.arange(batch * size, (batch + 1) * size, dtype=torch.float64)
        noise = replace(noise, shares=(0.25 + GOLDEN_RATIO * places) % 1)
        yield make_batch(source, process, raw, noise, null, device)


@torch.no_grad()
def paired_records(
    shd: SHD, teacher: ModelMixin, student: ModelMixin, batches: Iterator[Batch]
) -> Iterator[tuple[Records, Records]]:
    """What teacher and student attend to on each batch, in the blocks that SHD pairs."""
    student_blocks, teacher_blocks = ({n.partition(":")[0]: None for n in names} for names in shd.looks_at)
    with (
        AttentionCapture(teacher, teacher_blocks) as of_teacher,
        AttentionCapture(student, student_blocks) as of_student,
    ):
        for batch in batches:
            for model in (teacher, student):
                predict_frozen(model, batch.noised, batch.timesteps, batch.condition)
            taught = {name: record.to(student.device) for name, record in of_teacher.records.items()}
            yield (
                with_text_mask(taught, batch.condition),
                with_text_mask(of_student.records, batch.condition),
            )


def save_attention_maps(
    shd: SHD,
    teacher: ModelMixin,
    student: ModelMixin,
    source: Source,
    process: ForwardProcess,
    null: Condition,
    seed: int,
    path: Path,
    elements: int,
    pipeline: Path,
) -> None:
    """Write `attention.safetensors`: the maps of one image, and how a few dozen images are squeezed, block by block.

    Its description names the image's label or prompt, and of each block the grid of the query rows and the text keys.

    Every process calls this, since models may be sharded; the main one writes.

    Args:
        elements: of the largest block's maps of one image, by which it is decided how many are looked at together.
        pipeline: the folder of the one that the models stand in; where it takes prompts, it tells their words.
    """
    size = 2 ** int(math.log2(max(1, min(4, MAPS_AT_ONCE // elements))))
    batches = list(probe_batches(source, process, null, student.device, STUDY_IMAGES // size, size, seed))
    first = batches[0]
    height_and_width = tuple(first.clean.shape[-2:])
    tensors: dict[str, Tensor] = {}
    samples: dict[str, list[Tensor]] = {}
    blocks: list[dict[str, Any]] = []
    for teacher_records, student_records in paired_records(shd, teacher, student, iter(batches)):
        for name, found in shd.loss.inspect(teacher_records, student_records, height_and_width).items():
            for part in ("teacher", "squeezed", "student"):
                tensors.setdefault(f"{name}/{part}", getattr(found, part)[0].float().cpu())
            for part in ("coefficients", "weights", "residual", "divergence"):
                samples.setdefault(f"{name}/{part}", []).append(getattr(found, part).float().cpu())
        blocks = blocks or [
            {
                "student": name,
                "teacher": by,
                "kind": student_records[name].kind,
                "grid": _grid_of(tensors[f"{name}/student"], height_and_width),
                "text": text_keys(student, student_records[name]),
            }
            for name, by in shd.pairs.items()
        ]
    if not processes().is_main_process:
        return
    tensors |= {name: torch.cat(parts) for name, parts in samples.items()}
    tensors["image"] = picture(source, first.clean[0], path)
    number = grouped_step_indices(seed, 0, size, source.groups)[0]
    prompt = shown_prompt(source, pipeline, number, first.condition, path)
    label = first.condition.get("class_labels")
    description = {
        "label": None if label is None else int(label[0]),
        "timestep": int(first.timesteps[0]),
        **(prompt or ShownPrompt()).described(),
        "blocks": [block | {"text": _text_of(block["text"], prompt)} for block in blocks],
    }
    # safetensors refuses tensors that share memory, as squeezed maps do where no heads are merged
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_tensors(copies, path, {"description": json.dumps(description)})


def _grid_of(maps: Tensor, size: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of patches that the query rows of maps (H, Q, K) are of; None where they are of no image."""
    rows, columns = grid_shape(maps.shape[1], *size[-2:])
    return (rows, columns) if rows else None


def _text_of(keys: range | None, prompt: ShownPrompt | None) -> list[int] | None:
    """The first of a block's text keys and the one after the last; None where they are not those of the prompt."""
    if keys is None or prompt is None or prompt.length not in (None, len(keys)):
        return None
    return [keys.start, keys.stop]
