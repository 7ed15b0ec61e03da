"""`--dry-run`: build what a config names, take a few real steps on made-up images, and say what the run will cost.

Nothing is written and no data are read: whether they are there, the run itself will tell.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor
from torch.utils.data import TensorDataset

from shd_diffusion.config import DistillConfig, RunConfig, TrainConfig, TrainTeacherConfig
from shd_diffusion.data import Source
from shd_diffusion.environment import describe_environment
from shd_diffusion.errors import UserError
from shd_diffusion.losses import SHDLoss
from shd_diffusion.losses.denoising import ForwardProcess, forward_process
from shd_diffusion.models.adapter import freeze, null_label, predict, sample_shape
from shd_diffusion.models.factory import open_model
from shd_diffusion.progress import announce
from shd_diffusion.training.costs import Figures, describe_model, describe_plan, estimate, memory, show
from shd_diffusion.training.data_order import Layout
from shd_diffusion.training.feed import Feed
from shd_diffusion.training.launch import make_accelerator
from shd_diffusion.training.loop import take_step
from shd_diffusion.training.methods import Denoising, DenoisingLoss, Method
from shd_diffusion.training.operations import kept_for_backward, operation_counter
from shd_diffusion.training.stages import as_configured, build_to_train, distillation, place_teacher
from shd_diffusion.training.state import Training

SECONDS = 30.0  # that the last step may take
SHARE_OF_MEMORY = 0.25  # of what is free, that its activations may take


def dry_run(config: TrainTeacherConfig | DistillConfig, source: str) -> Figures:
    """Build and measure, print tables on standard error, and return the figures, ready for JSON.

    `teacher.path` may also be a config of `train-teacher`, for a teacher that is not on disk: its sizes count,
    its weights are random.

    Args:
        config: of either stage.
        source: where it stands, for messages.

    Raises:
        UserError: the config cannot be carried out.
    """
    announce("dry run: made-up images, no data are read, nothing is written")
    teacher = _open_teacher(config, source) if isinstance(config, DistillConfig) else None
    small = config.model_copy(update={"train": _alone(config.train, batch_size=1)})
    model, key = (config.student, "student") if isinstance(config, DistillConfig) else (config.model, "model")
    built = build_to_train(small, model, key, source, teacher)
    plan = describe_plan(teacher, built, config) if isinstance(config, DistillConfig) and teacher else []
    accelerator = make_accelerator(small.train, Path())
    if accelerator.num_processes > 1:
        raise UserError("--dry-run: it is for one process, and tells what each of several would need")
    built.to(accelerator.device)
    process = forward_process(config.diffusion)
    with _method(small, teacher, built, process, accelerator) as method:
        measured = measure(small, config.train.batch_size, method, built, process, accelerator)
    figures = {
        "config": source,
        "environment": describe_environment(),
        "student" if teacher else "model": describe_model(built),
        **({"teacher": describe_model(teacher)} if teacher else {}),
        "merge_plan": plan,
        "memory_bytes": memory(built, teacher, measured, config.train.batch_size),
        "operations_per_image": {
            "forward": count_forward(built),
            **({"teacher_forward": count_forward(teacher)} if teacher else {}),
            "training": measured["operations_per_image"],
        },
        "measured": measured,
        "run": estimate(config.train, measured),
    }
    show(figures, built, teacher, config)
    return figures


# --- building ------------------------------------------------------------------------------------------------


def _open_teacher(config: DistillConfig, source: str) -> ModelMixin:
    path = Path(config.teacher.path)
    if path.suffix in (".yaml", ".yml"):
        announce(f"teacher.path: {path} is a config: a teacher of its sizes with random weights")
    try:
        teacher = freeze(open_model(str(path)))
    except UserError as error:
        raise UserError(
            f"{source}: key `teacher.path`: {error}; a dry run also takes a config of train-teacher there"
        ) from error
    return teacher


def _alone(train: TrainConfig, batch_size: int) -> TrainConfig:
    """The optimisation as one process does it, without what only a long run wants."""
    return train.model_copy(
        update={
            "batch_size": batch_size,
            "gradient_accumulation_steps": 1,
            "num_processes": None,
            "shard": False,
            "compile": False,
            "trackers": [],
        }
    )


@contextmanager
def _method(
    config: RunConfig,
    teacher: ModelMixin | None,
    model: ModelMixin,
    process: ForwardProcess,
    accelerator: Accelerator,
) -> Iterator[Method]:
    """The method of a config; matched plans cost what adjacent ones do, once they are found."""
    if teacher is None or not isinstance(config, DistillConfig):
        denoising = Denoising(DenoisingLoss(process, config.diffusion))
        yield as_configured(denoising, config, model, accelerator)
        return
    shd = SHDLoss.from_config(config.losses.shd, config.seed)
    if shd.pairing == "matched":
        shd.pairing = "adjacent"
    place_teacher(teacher, config.teacher, accelerator.device)
    with distillation(config, teacher, model, process, shd) as method:
        yield as_configured(method, config, model, accelerator)


class MadeUpImages(Source):
    """Standard normal images of a model's shape, with every class among the labels."""

    needs_noise, num_workers = False, 0

    def __init__(self, model: ModelMixin, count: int) -> None:
        self.shape, self.num_classes = sample_shape(model), null_label(model)
        self.dataset = TensorDataset(torch.randn(count, *self.shape), torch.arange(count) % self.num_classes)  # type: ignore[assignment]

    def clean(self, items: Tensor, flipped: Tensor, noise: Tensor | None = None) -> Tensor:
        return items


# --- measuring -----------------------------------------------------------------------------------------------


def measure(
    config: RunConfig,
    batch_size: int,
    method: Method,
    model: ModelMixin,
    process: ForwardProcess,
    accelerator: Accelerator,
) -> Figures:
    """Three optimiser steps: one image to warm up, one to count, and as many as this machine can soon take to time.

    Args:
        config: with a batch size of 1, for one process.
        batch_size: the most images of the last step.
        method: what a step minimises.
        model: to be trained.
        process: the forward process.
        accelerator: of this process alone.
    """
    training = Training.prepare(model, method.parameters(), config.train, accelerator)
    training.wrapped.train()
    before, _ = _step(config, 1, method, training, process, accelerator)
    parameters = [*training.model.parameters(), *training.extra]
    with operation_counter() as operations, kept_for_backward(parameters) as kept:
        counted, _ = _step(config, 1, method, training, process, accelerator)
    room = SHARE_OF_MEMORY * _free_memory(accelerator) / max(kept.bytes, 1)
    images = max(1, min(batch_size, int(SECONDS / min(before, counted)), int(room)))
    seconds, terms = _step(config, images, method, training, process, accelerator)
    return {
        "images": images,
        "seconds": seconds,
        "seconds_per_image": seconds / images,
        "bytes_kept_per_image": kept.bytes,
        "operations_per_image": operations.get_total_flops(),
        "terms": terms,
        "device": str(accelerator.device),
        "threads": torch.get_num_threads(),
        "peak_bytes": _peak_memory(accelerator),
        "extra_parameters": sum(parameter.numel() for parameter in method.parameters()),
    }


def _step(
    config: RunConfig,
    images: int,
    method: Method,
    training: Training,
    process: ForwardProcess,
    accelerator: Accelerator,
) -> tuple[float, dict[str, float]]:
    """Seconds of one optimiser step on so many images, and the terms of its loss."""
    train = _alone(config.train, images)
    source = MadeUpImages(training.model, images)
    config = config.model_copy(update={"train": train})
    feed = Feed(source, process, training.model, config, Layout(images), accelerator.device, 0)
    began = time.perf_counter()
    terms, _ = take_step(training, method, feed.batches(0), method.weights(0), 0, train, accelerator)
    values = {name: float(term) for name, term in terms.items()}  # waits for the device
    return time.perf_counter() - began, values


@torch.no_grad()
def count_forward(model: ModelMixin) -> int:
    """Operations of one forward pass for one image."""
    noised = torch.randn(1, *sample_shape(model), device=model.device, dtype=model.dtype)
    zero = torch.zeros(1, dtype=torch.long, device=model.device)
    with operation_counter() as operations:
        predict(model, noised, zero, zero)
    return operations.get_total_flops()


def _free_memory(accelerator: Accelerator) -> int:
    if accelerator.device.type == "cuda":
        return torch.cuda.mem_get_info(accelerator.device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _peak_memory(accelerator: Accelerator) -> int:
    """Bytes that were in use at most: on the accelerator, or by this process."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
