"""A walk through a model beside its teacher: what each module is called with, and what it should put out."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from shd_diffusion.compression.feed_forward import channels_last
from shd_diffusion.compression.lockstep import Call, Lockstep, Note
from shd_diffusion.models.layouts import Slice, feed_forwards, head_layout
from shd_diffusion.squeezing.moments import share

CalibrationBatch: TypeAlias = tuple[Tensor, Tensor, Any]
"""Noised samples (B, C, ...), timesteps (B,), and whatever `predict` takes as their condition."""

Predict: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
"""What a model predicts for a batch."""

Pass: TypeAlias = Callable[[], Tensor]
"""A forward pass of one batch, which returns its prediction."""

Model = TypeVar("Model", bound=nn.Module)


def passes(
    model: nn.Module, batches: Iterable[CalibrationBatch], predict: Predict, into: list[Tensor] | None = None
) -> list[Pass]:
    """A forward pass of every batch, which also leaves its prediction in `into`."""

    def run(batch: CalibrationBatch) -> Tensor:
        prediction = predict(model, *batch)
        if into is not None:
            into.append(prediction)
        return prediction

    return [functools.partial(run, batch) for batch in batches]


def first_sample(batches: Sequence[CalibrationBatch]) -> CalibrationBatch:
    """A batch of one, whose call says what the model costs."""
    noised, timesteps, condition = batches[0]
    return noised[:1], timesteps[:1], {name: value[:1] for name, value in condition.items()}


def relative_change(changed: Iterable[Tensor], outputs: Iterable[Tensor]) -> float:
    """|changed - output|² / |output|², over all batches."""
    error = energy = 0.0
    for other, output in zip(changed, outputs, strict=True):
        error += float((other - output).double().square().sum())
        energy += float(output.double().square().sum())
    return share(error, energy)


def walk_beside(
    teacher: nn.Module,
    student: nn.Module,
    origins: Mapping[str, str],
    teacher_passes: Sequence[Pass],
    student_passes: Sequence[Pass],
) -> Generator[tuple[str, Sequence[Call], dict[str, list[Tensor]]]]:
    """Run both models on the same batches together, up to each of some modules in turn.

    The student stands before the module; of the teacher, which stands at the entry of one further on, only what the
    module put out is kept. A module that runs several times comes once. A feed-forward layer, as CogView4's of image
    and text, then has the calls of all its runs, for which the student is sent ahead.

    Args:
        teacher: what says what modules should put out.
        student: its modules may be changed when their turn comes.
        origins: the teacher's path of each module, by the student's: attention blocks and feed-forward layers.
        teacher_passes: of the teacher, one a batch.
        student_passes: of the student, of the same batches.

    Yields:
        The student's path of a module; its calls, or those of a feed-forward's output layer; and by path of each layer
        through which it puts out, what the teacher's puts out in each call, (..., C). Both are emptied when the next
        is asked for.
    """
    layers = feed_forwards(student)
    runs = count_runs(
        student, [layers[name].output.layer for name in origins if name in layers], student_passes[0]
    )
    seen: set[str] = set()
    sites = {_site(student, name): name for name in origins}
    outputs = {name: _outputs(teacher, origin) for name, origin in origins.items()}
    watched: dict[Hashable, tuple[str, Note]] = {
        (name, part.layer): (part.layer, functools.partial(_put_out, teacher, part))
        for name, parts in outputs.items()
        for part in parts
    }
    entries = {_entry(teacher, origin) for origin in origins.values()}
    with (
        Lockstep(teacher, entries, teacher_passes, watched) as teacher_walk,
        Lockstep(student, sites, student_passes) as walk,
    ):
        while calls := walk.advance():
            name, site = sites[calls[0].name], calls[0].name
            if name in seen and name in layers:
                continue
            own = [part.layer for part in _outputs(student, name)]
            put_out = [teacher_walk.noted((name, part.layer)) for part in outputs[name]]
            if name in seen:
                continue
            seen.add(name)
            if runs[site] > 1:
                calls = [*calls, *further_calls(student, site, student_passes, runs[site])]
                put_out[0] += [
                    target
                    for _ in range(1, runs[site])
                    for target in teacher_walk.noted((name, outputs[name][0].layer))
                ]
            yield name, calls, dict(zip(own, put_out, strict=True))
            for of_layer in put_out:
                of_layer.clear()
        while teacher_walk.advance():
            pass


class _Enough(Exception):
    """Ends a pass that has told what it was asked for."""


def count_runs(model: nn.Module, layers: Iterable[str], run: Pass) -> Counter[str]:
    """How often each layer runs in a pass."""
    found: Counter[str] = Counter()

    def stop(*_: Any) -> None:
        raise _Enough  # before the pass leaves its prediction anywhere

    with ExitStack() as stack, suppress(_Enough):
        for layer in layers:
            count = functools.partial(lambda name, *_: found.update([name]), layer)
            stack.enter_context(model.get_submodule(layer).register_forward_pre_hook(count))
        stack.enter_context(model.register_forward_hook(stop))
        run()
    return found


def further_calls(model: nn.Module, layer: str, runs: Sequence[Pass], count: int) -> list[Call]:
    """The calls of a layer after the first: of its second run in every pass, then of its third, as far as `count`."""
    by_pass: list[list[Call]] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        by_pass[-1].append(Call(layer, args, {}))
        if len(by_pass[-1]) == count:
            raise _Enough

    with model.get_submodule(layer).register_forward_pre_hook(note):
        for run in runs:
            by_pass.append([])
            with suppress(_Enough):
                run()
    return [call for calls in zip(*by_pass, strict=True) for call in calls][len(runs) :]


def copy_sharing(model: Model, apart_from: str | None = None) -> Model:
    """A copy of a model that has all parameters in common with it, but those of one module."""
    own = set() if apart_from is None else {id(p) for p in model.get_submodule(apart_from).parameters()}
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if id(p) not in own})


def have_apart(model: nn.Module, other: nn.Module, name: str = "") -> None:
    """Give a model its own copies of the parameters that an attention block or feed-forward layer has in common with
    another model, or of all of them; those that it ties stay tied."""
    paths = [name]
    if (layer := feed_forwards(model).get(name)) is not None:
        paths = [part.layer for part in (*layer.inputs, layer.output)]
    elif name:
        layout = head_layout(model, name)
        paths += [part.layer for part in (*layout.inputs, *layout.outputs)]
    common = {id(parameter) for parameter in other.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for path in paths:
        for parameter in model.get_submodule(path).parameters():
            if id(parameter) in common and id(parameter) not in copies:
                copies[id(parameter)] = copy.deepcopy(parameter)
    for module in model.modules():
        for key, own in module._parameters.items():
            module._parameters[key] = copies.get(id(own), own)


def _site(model: nn.Module, name: str) -> str:
    """Where a walk stops to squeeze a module: before an attention block, before a feed-forward's output layer."""
    layer = feed_forwards(model).get(name)
    return name if layer is None else layer.output.layer


def _entry(model: nn.Module, name: str) -> str:
    """The first module that runs of an attention block or a feed-forward layer, before which little is held."""
    layer = feed_forwards(model).get(name)
    return name if layer is None else layer.inputs[0].layer


def _outputs(model: nn.Module, name: str) -> tuple[Slice, ...]:
    """The columns by which a module puts out, of each stream; neurons are fitted with the heads beside them."""
    layer = feed_forwards(model).get(name)
    if layer is None:
        return head_layout(model, name).outputs
    return (Slice(layer.output.layer, 0, layer.output.start + layer.output.length),)


def _put_out(model: nn.Module, part: Slice, x: Tensor, output: Tensor) -> Tensor:
    """What a layer puts out for an input by these columns and its bias, channels last."""
    layer: Any = model.get_submodule(part.layer)
    weight = layer.weight.flatten(1)
    if part.length == weight.shape[1]:
        return channels_last(layer, output).clone()  # what comes after the layer may write into its output
    weight = weight[:, part.indices]
    return nn.functional.linear(channels_last(layer, x)[..., part.indices], weight, layer.bias)
