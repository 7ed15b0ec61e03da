"""What a training pass costs, counted: on tensors without content where real ones would be too large or too slow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from shd_diffusion.losses import build_terms
from shd_diffusion.losses.term import Batch
from shd_diffusion.models.denoiser import predict
from shd_diffusion.models.factory import cast, ready
from shd_diffusion.models.teacher import Teacher
from shd_diffusion.operations import Meter
from shd_diffusion.squeezing.plan import plan_merges
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import Parts
from shd_diffusion.training.made_up import MadeUpSamples
from shd_diffusion.training.objectives import TrainingLoss


@dataclass(frozen=True)
class PassCount:
    """Of one forward and backward pass with the loss.

    Attributes:
        operations: of all images of the pass.
        activations: bytes held at most by what the pass makes, the gradients of weights left out.
        extra_parameters: of the terms of the loss.
    """

    operations: int
    activations: int
    extra_parameters: int


def count_pass(
    parts: Parts, images: int, checkpointing: bool, accelerator: Accelerator, content: bool
) -> PassCount:
    """Count a pass of so many made-up images, by the very loss that trains, at the first step.

    Args:
        parts: built on made-up samples; their models may be without weights.
        images: of the pass.
        checkpointing: whether the student's activations are computed again for the backward pass.
        accelerator: on what, and in which precision.
        content: whether to compute on real tensors, with random weights. The counts are the same; tensors without
            content need no memory, but a millisecond an operation.
    """
    batch = made_up_batch(parts, images, accelerator.device)
    with nullcontext() if content else _without_content() as mode:
        parts = materialised(parts, accelerator.device, checkpointing)
        batch = batch if mode is None else _fake(batch, mode)
        loss = training_loss(parts)
        parameters = [*parts.model.parameters(), *loss.parameters()]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)  # those of a pass before: not a part of this one
        teacher = [] if parts.teacher is None else [parts.teacher.model]
        outside = chain.from_iterable(
            (*m.parameters(), *m.buffers()) for m in (parts.model, loss.terms, *teacher)
        )
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        weights = loss.weights(0)
        parts.model.train()
        with loss, Meter([*outside, *gradients]) as meter:
            with accelerator.autocast():
                terms = loss(parts.model, batch, 0)
            torch.stack([weights[name] * term for name, term in terms.items()]).sum().backward()
    extra = sum(parameter.numel() for parameter in loss.parameters())
    return PassCount(meter.operations, meter.peak, extra)


def count_forward(parts: Parts, model: ModelMixin) -> int:
    """Operations of one forward pass for one image, by a model without weights."""
    with torch.device("meta"), torch.no_grad():
        noised, timestep = torch.empty(1, *parts.data.shape), torch.zeros(1, dtype=torch.long)
        condition = {name: value.to("meta") for name, value in parts.data.example().items()}
        with Meter() as meter:
            predict(twin(model, torch.device("meta"), torch.float32), noised, timestep, condition)
    return meter.operations


def training_loss(parts: Parts) -> TrainingLoss:
    """The loss of a run that is about to begin, with adjacent plans for matched ones, which cost as much."""
    teacher = None if parts.teacher is None else parts.teacher.model
    loss = TrainingLoss(parts.process, parts.terms, parts.model, teacher, parts.config.train.max_steps)
    if loss.shd is not None:
        loss.shd.loss.plans = {name: plan_merges(*heads) for name, heads in paired_heads(parts).items()}
    return loss


def paired_heads(parts: Parts) -> dict[str, tuple[int, int]]:
    """The teacher's and the student's heads, by student block that learns by SHD."""
    shd = parts.terms.get("shd")
    if shd is None or parts.teacher_trace is None:
        return {}
    teacher, student = parts.teacher_trace.records, parts.student_trace.records
    return {name: (teacher[by].heads, student[name].heads) for name, by in shd.pairs.items()}


def made_up_batch(parts: Parts, images: int, device: torch.device) -> Batch:
    """A pass of so many samples of the first step."""
    assert isinstance(parts.data, MadeUpSamples)
    samples = replace(parts, data=parts.data.of(images))
    (batch, _), *_ = samples.loader(device)(BatchLayout(images), 0).step(0)
    return batch


# --- the same models with other tensors ---------------------------------------------------------------------------


def materialised(parts: Parts, device: torch.device, checkpointing: bool) -> Parts:
    """The same parts with new models on a device, with random weights and as it is to be trained."""
    model = twin(parts.model, device)
    if checkpointing:
        model.enable_gradient_checkpointing()
    teacher = parts.teacher
    if teacher is not None:
        teacher = Teacher(twin(teacher.model, device).eval(), teacher.pipeline, teacher.scheduler)
    with torch.device(device):
        terms = build_terms(parts.config.losses, parts.student_trace, parts.teacher_trace, parts.config.seed)
    return replace(parts, model=model, teacher=teacher, terms=terms)


def twin(model: ModelMixin, device: torch.device, dtype: torch.dtype | None = None) -> ModelMixin:
    """A model of the same config and precision, if no other is given, with the same parameters frozen."""
    with torch.device(device):
        other = cast(ready(type(model).from_config(model.config)), dtype or model.dtype)
    for name, parameter in model.named_parameters():
        other.get_parameter(name).requires_grad_(parameter.requires_grad)
    return other


@contextmanager
def _without_content() -> Iterator[FakeTensorMode]:
    """Context in which tensors have shapes and no content."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield mode


def _fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    def empty(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor)

    tensors = {name: empty(getattr(batch, name)) for name in ("clean", "noise", "noised", "timesteps")}
    condition, mask = ({n: empty(t) for n, t in c.items()} for c in (batch.condition, batch.mask))
    return replace(batch, **tensors, condition=condition, mask=mask)
