"""A walk through a model beside its teacher: what each module is called with, and what it should put out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from shd_diffusion.compression.feed_forward import channels_last
from shd_diffusion.compression.lockstep import Call, Follower, Lockstep
from shd_diffusion.models.layouts import Slice, feed_forwards, head_layout

Batch: TypeAlias = tuple[Tensor, Tensor, Any]
"""Noised samples (B, C, ...), timesteps (B,), and whatever `predict` takes as their condition."""

Predict: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
"""What a model predicts for a batch."""

Pass: TypeAlias = Callable[[], Tensor]
"""A forward pass of one batch, which returns its prediction."""

Model = TypeVar("Model", bound=nn.Module)


def passes(
    model: nn.Module, batches: Iterable[Batch], predict: Predict, into: list[Tensor] | None = None
) -> list[Pass]:
    """A forward pass of every batch, which also leaves its prediction in `into`."""

    def run(batch: Batch) -> Tensor:
        prediction = predict(model, *batch)
        if into is not None:
            into.append(prediction)
        return prediction

    return [functools.partial(run, batch) for batch in batches]


def first_sample(batches: Sequence[Batch]) -> Batch:
    """A batch of one, whose call says what the model costs."""
    noised, timesteps, condition = batches[0]
    return noised[:1], timesteps[:1], {name: value[:1] for name, value in condition.items()}


def relative_change(changed: Iterable[Tensor], outputs: Iterable[Tensor]) -> float:
    """|changed - output|² / |output|², over all batches."""
    error = energy = 0.0
    for other, output in zip(changed, outputs, strict=True):
        error += float((other - output).double().square().sum())
        energy += float(output.double().square().sum())
    return error / energy


def walk_beside(
    teacher: nn.Module,
    student: nn.Module,
    origins: Mapping[str, str],
    teacher_passes: Sequence[Pass],
    student_passes: Sequence[Pass],
) -> Generator[tuple[str, Sequence[Call], dict[str, list[Tensor]]]]:
    """Run both models on the same batches together, up to each of some modules in turn.

    Args:
        teacher: what says what modules should put out.
        student: its modules may be changed when their turn comes.
        origins: the teacher's path of each module, by the student's: attention blocks and feed-forward layers.
        teacher_passes: of the teacher, one a batch.
        student_passes: of the student, of the same batches.

    Yields:
        The student's path of a module; its calls, or those of a feed-forward's output layer; and by path of each layer
        through which it puts out, what the teacher's puts out in each call, (..., C). A module that
        runs several times comes as often.
    """
    sites = {_site(student, name): name for name in origins}
    sources = {name: _outputs(teacher, origin) for name, origin in origins.items()}
    readers: dict[str, list[str]] = {}
    for name, parts in sources.items():
        for part in parts:
            readers.setdefault(part.layer, []).append(name)
    with (
        Lockstep(teacher, readers, teacher_passes) as teacher_walk,
        Lockstep(student, sites, student_passes) as walk,
    ):
        teacher_calls = Follower(teacher_walk, readers)
        while calls := walk.advance():
            name = sites[calls[0].name]
            found = teacher_calls.calls(name, [part.layer for part in sources[name]])
            own = [part.layer for part in _outputs(student, name)]
            put_out = (
                _put_out(teacher, part, of_layer) for part, of_layer in zip(sources[name], found, strict=True)
            )
            yield name, calls, dict(zip(own, put_out, strict=True))
        teacher_walk.advance()


def copy_sharing(model: Model, apart_from: str | None = None) -> Model:
    """A copy of a model that has all parameters in common with it, but those of one module."""
    own = set() if apart_from is None else {id(p) for p in model.get_submodule(apart_from).parameters()}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def _site(model: nn.Module, name: str) -> str:
    """Where a walk stops to squeeze a module: before an attention block, before a feed-forward's output layer."""
    layer = feed_forwards(model).get(name)
    return name if layer is None else layer.output.layer


def _outputs(model: nn.Module, name: str) -> tuple[Slice, ...]:
    """The columns by which a module puts out, of each stream; neurons are fitted with the heads beside them."""
    layer = feed_forwards(model).get(name)
    if layer is None:
        return head_layout(model, name).outputs
    return (Slice(layer.output.layer, 0, layer.output.start + layer.output.length),)


def _put_out(model: nn.Module, part: Slice, calls: Sequence[Call]) -> list[Tensor]:
    """What a layer puts out in each call by these columns and its bias, channels last."""
    layer: Any = model.get_submodule(part.layer)
    weight = layer.weight.flatten(1)[:, part.indices]
    inputs = (channels_last(layer, call.args[0])[..., part.indices] for call in calls)
    return [nn.functional.linear(x, weight, layer.bias) for x in inputs]
