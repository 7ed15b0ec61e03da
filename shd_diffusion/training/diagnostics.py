"""Teacher and student side by side outside of the training steps: calibration, and the report's attention maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from torch import Tensor

from shd_diffusion.attention import AttentionCapture
from shd_diffusion.attention.blocks import text_keys
from shd_diffusion.data import Source
from shd_diffusion.files import save_tensors
from shd_diffusion.losses.inspect_loss import Inspection
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
from shd_diffusion.training.build import Parts
from shd_diffusion.training.shown_sample import ShownPrompt, picture, shown_prompt

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
STUDY_IMAGES = 32
# elements of the teacher's maps of one block, which are there one block at a time; as many again are squeezed, and the
# student's
MAPS_AT_ONCE = 2**27
# what a report shows of a map, and of where in the image a word is attended to
MAX_SIDE = 64
MAX_PATCHES = 32
TEXT = "_text"


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
) -> Iterator[tuple[Batch, Records, Records]]:
    """Each batch, and what teacher and student attend to on it in the blocks that SHD pairs."""
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
                batch,
                with_text_mask(taught, batch.condition),
                with_text_mask(of_student.records, batch.condition),
            )


def save_attention_maps(
    shd: SHD, parts: Parts, student: ModelMixin, path: Path, elements: int, pipeline: Path
) -> None:
    """Write `attention.safetensors`: the maps of one image, and how a few dozen images are squeezed, block by block.

    Its description names the image's label or prompt. Maps have at most `MAX_SIDE` rows and columns. Of a block that
    attends to text there is also what each patch attends to of each text key, see `attention_to`.

    Every process calls this, since models may be sharded; the main one writes.

    Args:
        parts: of the run.
        student: as it was trained.
        elements: of the largest block's maps of one image, by which it is decided how many are looked at together.
        pipeline: the folder of the one that the models stand in; where it takes prompts, it tells their words.
    """
    assert parts.teacher is not None
    source, seed = parts.data, parts.config.seed
    size = 2 ** int(math.log2(max(1, min(4, MAPS_AT_ONCE // elements))))
    probes = probe_batches(
        source, parts.process, parts.null, student.device, STUDY_IMAGES // size, size, seed
    )
    first: Batch | None = None
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    samples: dict[str, list[Tensor]] = {}
    for batch, teacher_records, student_records in paired_records(shd, parts.teacher.model, student, probes):
        shape = tuple(batch.clean.shape[-2:])
        for name, found in shd.loss.inspect(teacher_records, student_records, shape):
            if processes().is_main_process:
                for part in ("coefficients", "weights", "residual", "divergence"):
                    samples.setdefault(f"{name}/{part}", []).append(getattr(found, part).float().cpu())
                if first is None:
                    kinds[name] = student_records[name].kind
                    tensors |= _shown(name, found, text_keys(student, student_records[name]), shape)
            del found  # makes room for the next block's
        first = first or batch
    if not processes().is_main_process or first is None:
        return
    tensors |= {name: torch.cat(of_all) for name, of_all in samples.items()}
    tensors["image"] = picture(source, first.clean[0], path)
    number = grouped_step_indices(seed, 0, size, source.groups)[0]
    prompt = shown_prompt(source, pipeline, number, first.condition, path)
    for name in [name for name in tensors if name.endswith(TEXT)]:
        if prompt is None or prompt.length not in (None, len(tensors[name])):
            del tensors[name]  # its keys are not the prompt's
    label = first.condition.get("class_labels")
    description = {
        "label": None if label is None else int(label[0]),
        "timestep": int(first.timesteps[0]),
        **(prompt or ShownPrompt()).described(),
        "blocks": [{"student": name, "teacher": by, "kind": kinds[name]} for name, by in shd.pairs.items()],
    }
    # safetensors refuses tensors that share memory, as squeezed maps do where no heads are merged
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_tensors(copies, path, {"description": json.dumps(description)})


def _shown(name: str, found: Inspection, keys: range | None, size: tuple[int, ...]) -> dict[str, Tensor]:
    """What is shown of the first image's maps in one block, of an image or latent of this height and width."""
    tensors: dict[str, Tensor] = {}
    rows, columns = grid_shape(found.student.shape[2], *size)
    for part in ("teacher", "squeezed", "student"):
        maps = getattr(found, part)[0].float()
        tensors[f"{name}/{part}"] = reduced(maps).cpu()
        if keys is not None and rows:
            tensors[f"{name}/{part}{TEXT}"] = attention_to(maps, keys, (rows, columns)).cpu()
    return tensors


def reduced(maps: Tensor) -> Tensor:
    """Maps (H, Q, K) with at most `MAX_SIDE` rows and columns, by the mean over areas."""
    return F.adaptive_avg_pool2d(maps, (min(MAX_SIDE, maps.shape[1]), min(MAX_SIDE, maps.shape[2])))


def attention_to(maps: Tensor, keys: range, grid: tuple[int, int]) -> Tensor:
    """What each patch of a grid attends to of each of some keys, mean over the heads of maps (H, Q, K).

    Returns:
        (keys, rows, columns), with at most `MAX_PATCHES` rows and columns, by the mean over areas.
    """
    shares = maps[..., keys.start : keys.stop].mean(0).T.unflatten(1, grid)
    shrink = min(1.0, MAX_PATCHES / max(grid))
    rows, columns = (max(1, round(side * shrink)) for side in grid)
    return F.adaptive_avg_pool2d(shares, (rows, columns))
