"""What a training pass costs, counted on tensors without content, which need no memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from shd_diffusion.losses import build_terms
from shd_diffusion.losses.term import Batch
from shd_diffusion.models.factory import cast, ready
from shd_diffusion.models.quantised import quantise
from shd_diffusion.operations import Meter
from shd_diffusion.squeezing.plan import BlockPlan, plan_merges
from shd_diffusion.training.batches import BatchLayout
from shd_diffusion.training.build import Parts, is_quantised, teacher_rate
from shd_diffusion.training.made_up import MadeUpSamples
from shd_diffusion.training.objectives import TrainingLoss


@dataclass(frozen=True)
class PassCount:
    """Of one forward and backward pass with the loss.

    Attributes:
        operations: of all images of the pass, on average over the steps of the run.
        forward: those of the student's forward pass in it, and of the teacher's, if there is one.
        activations: bytes held at most by what the pass makes, the gradients of weights left out.
        extra_parameters: of the terms of the loss.
    """

    operations: int
    forward: tuple[int, ...]
    activations: int
    extra_parameters: int


def count_passes(parts: Parts, images: int, accelerator: Accelerator) -> dict[bool, PassCount]:
    """Count a pass of so many made-up images without and with gradient checkpointing, on tensors without content.

    Args:
        parts: built on made-up samples; their models may be without weights.
        images: of the pass.
        accelerator: on what, and in which precision.
    """
    device = accelerator.device
    batch = made_up_batch(parts, images, device)
    with without_content() as mode:
        parts = _with_models(parts, device, partial(_empty, device=device))
        return meter_passes(parts, _fake(batch, mode), accelerator)


def meter_passes(parts: Parts, batch: Batch, accelerator: Accelerator) -> dict[bool, PassCount]:
    """Two passes over a batch, without and with gradient checkpointing.

    The first has in it what SHD computes once for all steps, such as the products of the teacher's output weights.
    """
    parts.model.disable_gradient_checkpointing()
    plain = meter_pass(parts, batch, accelerator)
    parts.model.enable_gradient_checkpointing()
    return {False: plain, True: meter_pass(parts, batch, accelerator)}


def meter_pass(parts: Parts, batch: Batch, accelerator: Accelerator) -> PassCount:
    """What the very loss that trains costs on a batch, forward and backward.

    Where not all terms count at every step, that is the most of memory, and the mean over the steps of operations.
    """
    loss = training_loss(parts)
    found = {step: _meter_step(parts, loss, batch, step, accelerator) for step in loss.stages}
    operations = sum(found[step].operations * steps for step, steps in loss.stages.items())
    return replace(
        max(found.values(), key=lambda count: count.activations),
        operations=operations // sum(loss.stages.values()),
        forward=max((count.forward for count in found.values()), key=len),
    )


def _meter_step(
    parts: Parts, loss: TrainingLoss, batch: Batch, step: int, accelerator: Accelerator
) -> PassCount:
    models = [parts.model] if parts.teacher is None else [parts.model, parts.teacher.model]
    parameters = [*parts.model.parameters(), *loss.parameters(), *loss.teacher_parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # those of a pass before: not a part of this one
    outside = chain.from_iterable(
        (*module.parameters(), *module.buffers()) for module in (*models, loss.terms)
    )
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    weights = loss.weights(step)
    parts.model.train()
    with ExitStack() as stack:
        meter = stack.enter_context(Meter([*outside, *gradients]))
        stack.enter_context(loss)
        calls = [stack.enter_context(_metered_calls(model, meter)) for model in models]
        with accelerator.autocast():
            terms = loss(parts.model, batch, step)
        torch.stack([weights[name] * term for name, term in terms.items()]).sum().backward()
    forward = tuple(of_model[0] for of_model in calls if of_model)  # the first is of all tokens
    return PassCount(meter.operations, forward, meter.peak, sum(p.numel() for p in loss.parameters()))


@contextmanager
def _metered_calls(model: nn.Module, meter: Meter) -> Iterator[list[int]]:
    """Context that notes the operations of each call of a model."""
    began: list[int] = []
    calls: list[int] = []
    hooks = (
        model.register_forward_pre_hook(lambda *_: began.append(meter.operations)),
        model.register_forward_hook(lambda *_: calls.append(meter.operations - began.pop())),
    )
    yield calls
    for hook in hooks:
        hook.remove()


def training_loss(parts: Parts) -> TrainingLoss:
    """The loss of a run that is about to begin, with adjacent plans for matched ones, which cost as much."""
    teacher = None if parts.teacher is None else parts.teacher.model
    steps, rate = parts.config.train.max_steps, teacher_rate(parts.config)
    loss = TrainingLoss(parts.process, parts.terms, parts.model, teacher, steps, rate)
    if loss.shd is not None:
        loss.shd.loss.plans = {name: BlockPlan(plan_merges(*heads)) for name, heads in loss.shd.heads.items()}
    return loss


def made_up_batch(parts: Parts, images: int, device: torch.device) -> Batch:
    """A pass of so many samples of the first step."""
    assert isinstance(parts.data, MadeUpSamples)
    samples = replace(parts, data=parts.data.of(images))
    (batch, _), *_ = samples.loader(device)(BatchLayout(images), 0).step(0)
    return batch


# --- the same models with other tensors ---------------------------------------------------------------------------


def materialised(parts: Parts, device: torch.device) -> Parts:
    """The same parts with new models on a device, with random weights."""
    made = _with_models(parts, device, lambda model: twin(model, device))
    if is_quantised(parts.config):
        quantise(made.model)
    return made


def _with_models(parts: Parts, device: torch.device, made: Callable[[ModelMixin], ModelMixin]) -> Parts:
    model, teacher = made(parts.model), parts.teacher
    if teacher is not None:
        teacher = replace(teacher, model=made(teacher.model).eval())
    with torch.device(device):
        terms = build_terms(parts.config.losses, parts.student_trace, parts.teacher_trace, parts.config.seed)
    return replace(parts, model=model, teacher=teacher, terms=terms)


def twin(model: ModelMixin, device: torch.device) -> ModelMixin:
    """A model of the same config and precision, with the same parameters frozen."""
    with torch.device(device):
        other = cast(ready(type(model).from_config(model.config)), model.dtype)
    for name, parameter in model.named_parameters():
        other.get_parameter(name).requires_grad_(parameter.requires_grad)
    return other


@contextmanager
def without_content() -> Iterator[FakeTensorMode]:
    """Context in which tensors have shapes and no content."""
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield mode


def _empty(model: ModelMixin, device: torch.device) -> ModelMixin:
    """A copy on a device: many times faster than a new one, whose weights would be drawn."""
    with unset_fake_temporarily():  # a buffer without content cannot be copied
        model = deepcopy(model)
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            module.register_parameter(name, nn.Parameter(empty, tensor.requires_grad))
        for name, tensor in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))
    return model


def _fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    def empty(tensor: Tensor) -> Tensor:
        return mode.from_tensor(tensor)

    tensors = {name: empty(getattr(batch, name)) for name in ("clean", "noise", "noised", "timesteps")}
    told = (batch.condition, batch.mask, batch.null)
    condition, mask, null = ({name: empty(tensor) for name, tensor in each.items()} for each in told)
    mixed = tuple(_fake(each, mode) for each in batch.mixed)
    return replace(batch, **tensors, condition=condition, mask=mask, null=null, mixed=mixed)
