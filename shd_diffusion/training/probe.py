"""Looking at teacher and student side by side outside of the training steps: calibration, and the report's maps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import ModelMixin
from safetensors.torch import save_file
from torch import Tensor

from shd_diffusion.attention import AttentionCapture, AttentionRecord
from shd_diffusion.data import Source
from shd_diffusion.files import replacing_file
from shd_diffusion.losses import SHDLoss
from shd_diffusion.losses.denoising import ForwardProcess
from shd_diffusion.models.adapter import null_label, sample_shape
from shd_diffusion.processes import processes
from shd_diffusion.training.data_order import Layout, StepSampler
from shd_diffusion.training.draws import draw
from shd_diffusion.training.methods import Batch, make_batch, predict_frozen

Records = dict[str, AttentionRecord]

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
STUDY_BATCHES = 8
STUDY_BATCH_SIZE = 4


def probe_batches(
    source: Source, model: ModelMixin, process: ForwardProcess, count: int, size: int, seed: int
) -> Iterator[Batch]:
    """Noised batches that no training step sees, with labels that are never dropped.

    The timesteps go round the schedule by the golden ratio, from a quarter of it, so that any number covers it evenly.
    """
    shape, null, device = sample_shape(model), null_label(model), model.device
    items = source.batches(StepSampler(seed, len(source), Layout(size), 0, count))
    for step, (raw, labels) in enumerate(items):
        # negative steps: draws of their own
        drawn = draw(seed, -1 - step, size, shape, process.num_timesteps, 0.0, source.needs_noise)
        places = torch.arange(step * size, (step + 1) * size, dtype=torch.float64)
        timesteps = ((0.25 + GOLDEN_RATIO * places) % 1 * process.num_timesteps).long()
        drawn = replace(drawn, timesteps=timesteps).take(slice(None), device)
        clean = source.clean(raw.to(device), drawn.flipped, drawn.latent_noise)
        yield make_batch(process, clean, labels.to(device), drawn, null)


@torch.no_grad()
def paired_records(
    teacher: ModelMixin, student: ModelMixin, batches: Iterator[Batch]
) -> Iterator[tuple[Records, Records]]:
    """What teacher and student attend to on each batch."""
    with AttentionCapture(teacher) as of_teacher, AttentionCapture(student) as of_student:
        for batch in batches:
            for model in (teacher, student):
                predict_frozen(model, batch)
            taught = {name: record.to(student.device) for name, record in of_teacher.records.items()}
            yield taught, of_student.records


def study_attention(
    shd: SHDLoss,
    teacher: ModelMixin,
    student: ModelMixin,
    source: Source,
    process: ForwardProcess,
    seed: int,
    path: Path,
) -> None:
    """Write `attention.safetensors`: the maps of one image, and how a few dozen images are squeezed, block by block.

    Every process calls this, since models may be sharded; the main one writes.
    """
    first, *_ = batches = list(probe_batches(source, student, process, STUDY_BATCHES, STUDY_BATCH_SIZE, seed))
    tensors: dict[str, Tensor] = {"image": first.clean[0]}
    samples: dict[str, list[Tensor]] = {}
    for records in paired_records(teacher, student, iter(batches)):
        pairs = shd.pairs(*records)
        kinds = {name: records[1][name].kind for name in pairs}
        for name, found in shd.explain(*records).items():
            for part in ("teacher", "squeezed", "student"):
                tensors.setdefault(f"{name}/{part}", getattr(found, part)[0])
            for part in ("coefficients", "weights", "residual", "divergence"):
                samples.setdefault(f"{name}/{part}", []).append(getattr(found, part))
    tensors |= {name: torch.cat(parts) for name, parts in samples.items()}
    description = {
        "label": int(first.labels[0]),
        "timestep": int(first.timesteps[0]),
        "blocks": [
            {"student": ours, "teacher": theirs, "kind": kinds[ours]} for ours, theirs in pairs.items()
        ],
    }
    if not processes().is_main_process:
        return
    with replacing_file(path) as temporary:
        # safetensors refuses tensors that share memory, as squeezed maps do where no heads are merged
        copies = {name: tensor.float().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(copies, temporary, metadata={"description": json.dumps(description)})
