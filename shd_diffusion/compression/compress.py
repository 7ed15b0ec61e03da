"""A smaller model from a trained one by least squares, block after block (docs/method.md section 8)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from shd_diffusion.attention import attention_blocks
from shd_diffusion.attention.blocks import LINEAR
from shd_diffusion.compression.attention import (
    HeadOptions,
    check_can_be_squeezed,
    head_counts,
    squeeze_attention,
)
from shd_diffusion.compression.depth import block_importances, block_list, remove_blocks
from shd_diffusion.compression.feed_forward import channels_last, squeeze_feed_forward
from shd_diffusion.compression.lockstep import Call, Follower, Lockstep
from shd_diffusion.models.layouts import Slice, feed_forwards, head_layout
from shd_diffusion.models.squeezed import declare_shape, shape, squeezed_class
from shd_diffusion.squeezing.blocks import blocks_to_remove

Batch: TypeAlias = tuple[Tensor, Tensor, Any]
"""Noised samples (B, C, ...), timesteps (B,), and whatever `predict` takes as their condition."""

Predict: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]
"""What a model predicts for a batch."""

Counts: TypeAlias = int | float | Mapping[str, int] | None
"""A count for every module, a share of what each has, counts by module path in the teacher, or None: all of them."""


@dataclass(frozen=True, slots=True)
class Part:
    """What became of one module.

    Attributes:
        name: module path in the model that was compressed.
        what: what it has fewer of; `block` is a block that left.
        before: how many it had.
        after: how many it has.
        lost_before: |error|² / |teacher's output|², about the means: of merged heads before the refit, of the layer
            with all its neurons. It includes what the squeezed blocks before it have moved. Neurons whose layer also
            projects heads count with them.
        lost: the same in the end. Of a block: the change of the model's output where it alone is skipped.
    """

    name: str
    what: Literal["heads", "neurons", "block"]
    before: int
    after: int
    lost_before: float
    lost: float


@dataclass(frozen=True, slots=True)
class CompressedModel:
    """A compressed model and what it lost.

    Attributes:
        model: in evaluation mode; of its teacher's class where that can express its shape, else `Squeezed<class>`.
        parts: in the order in which they were squeezed.
        lost: |teacher's prediction - its own|² / |teacher's prediction|² on the calibration batches.
    """

    model: ModelMixin
    parts: tuple[Part, ...]
    lost: float


@torch.no_grad()
def compress(
    teacher: ModelMixin,
    batches: Iterable[Batch],
    predict: Predict,
    heads: Counts = None,
    neurons: Counts = None,
    blocks: int | None = None,
    options: HeadOptions | None = None,
    plain: bool = False,
    report: Callable[[Part], object] = lambda part: None,
) -> CompressedModel:
    """Make a model of fewer blocks, heads and neurons from a teacher's weights, without training.

    Blocks leave first. Then every attention block and feed-forward layer, in the order in which they run, is fitted by
    least squares to what the teacher's own puts out, on what the layers already squeezed give it. All batches walk
    through the model together: the time is that of a few forward passes of each batch, and what is kept of them is what
    a forward pass holds. The moments that the fits read do not grow with the batches.

    Args:
        teacher: a diffusers model; it is put in evaluation mode and otherwise left as it is.
        batches: calibration data, noised as in training, with dropped conditions among the others.
        predict: runs a model on a batch.
        heads: of the attention blocks.
        neurons: of the feed-forward layers.
        blocks: how many stay; None for all.
        options: how heads are squeezed.
        plain: the result is of the teacher's own class. Its heads are then as much wider as there are fewer, their
            queries and keys factored; neurons stay.
        report: is told of every part when it is done.

    Raises:
        ValueError: counts that are not there, blocks that cannot be squeezed, or no batches.
    """
    options = options or HeadOptions()
    plain_shape = _plain_shape(teacher, heads, neurons) if plain else {}
    if plain_shape:
        options = replace(options, queries="factor", head_dim=plain_shape["attention_head_dim"])
    held = list(batches)
    if not held:
        raise ValueError("there are no calibration batches")
    asked = wanted_heads(teacher, heads, options) | wanted_neurons(teacher, neurons)
    if asked and not plain:
        kind: Any = type(teacher)
        squeezed_class(kind)  # refuses a class that cannot be saved, before anything is computed
    teacher.eval()
    student = copy.deepcopy(teacher)
    parts: list[Part] = []

    def tell(part: Part) -> None:
        parts.append(part)
        report(part)

    origins: dict[str, str] = {}
    if blocks is not None:
        origins = _squeeze_depth(student, blocks, passes(student, held, predict, []), tell)
    stock = shape(student)
    wanted = {name: asked[_origin(name, origins)] for name in stock if _origin(name, origins) in asked}

    predicted: tuple[list[Tensor], list[Tensor]] = [], []
    sites = {_site(student, name): name for name in wanted}
    sources = {name: _outputs(teacher, _origin(name, origins)) for name in wanted}
    readers: dict[str, list[str]] = {}
    for name, parts_of_teacher in sources.items():
        for part in parts_of_teacher:
            readers.setdefault(part.layer, []).append(name)
    with (
        Lockstep(teacher, readers, passes(teacher, held, predict, predicted[0])) as teacher_walk,
        Lockstep(student, sites, passes(student, held, predict, predicted[1])) as walk,
    ):
        teacher_calls = Follower(teacher_walk, readers)
        while calls := walk.advance():
            name = sites[calls[0].name]
            teacher_found = teacher_calls.calls(name, [part.layer for part in sources[name]])
            if shape(student)[name] == wanted[name]:
                continue  # a module that runs twice
            own = [part.layer for part in _outputs(student, name)]
            put_out = (
                _put_out(teacher, part, of_layer)
                for part, of_layer in zip(sources[name], teacher_found, strict=True)
            )
            targets = dict(zip(own, put_out, strict=True))
            what: Literal["heads", "neurons"]
            if name in feed_forwards(student):
                (target,) = targets.values()
                what, fit = "neurons", squeeze_feed_forward(student, name, wanted[name], calls, target)
            else:
                what, fit = "heads", squeeze_attention(student, name, wanted[name], calls, targets, options)
            tell(Part(_origin(name, origins), what, stock[name], wanted[name], *fit))
        teacher_walk.advance()
    if plain_shape:
        if idle := [name for name, count in wanted.items() if shape(student)[name] != count]:
            raise ValueError(
                f"`{idle[0]}` runs with no calibration batch, so the class cannot stay; leave `plain` out"
            )
        student.register_to_config(**plain_shape)
    else:
        declare_shape(student, stock)
    error = sum(float((a - b).double().square().sum()) for a, b in zip(*predicted, strict=True))
    energy = sum(float(a.double().square().sum()) for a in predicted[0])
    return CompressedModel(student, tuple(parts), error / energy)


# --- what is asked for --------------------------------------------------------------------------------------


def wanted_heads(model: nn.Module, heads: Counts, options: HeadOptions) -> dict[str, int]:
    """The heads that every attention block that loses some is to have.

    Raises:
        ValueError: counts that are not there, or a block that cannot be squeezed.
    """
    if heads is None:
        return {}
    blocks = attention_blocks(model)
    have = {
        name: block.heads for name, block in blocks.items() if isinstance(heads, Mapping) or block.capturable
    }
    if not have and any(block.reason == LINEAR for block in blocks.values()):
        raise ValueError(
            f"the only attention of {type(model).__name__} is linear: {LINEAR}, and no heads to merge"
        )
    found = _wanted(have, heads, "heads")
    for name, count in found.items():
        if (reason := blocks[name].reason) is not None:
            raise ValueError(f"attention block `{name}`: {reason}")
        check_can_be_squeezed(model, name, options)
        possible = head_counts(model, name)
        if isinstance(heads, float):
            found[name] = min(possible, key=lambda each: (abs(each - count), -each))
        elif count not in possible:
            raise ValueError(
                f"`{name}` shares {blocks[name].key_value_heads} keys and values among {blocks[name].heads} heads, "
                f"which can become {', '.join(map(str, possible))}, not {count}"
            )
    return {name: count for name, count in found.items() if count < have[name]}


def wanted_neurons(model: nn.Module, counts: Counts) -> dict[str, int]:
    """The neurons that every feed-forward layer that loses some is to have.

    Raises:
        ValueError: counts that are not there.
    """
    return _wanted({name: layer.neurons for name, layer in feed_forwards(model).items()}, counts, "neurons")


def _plain_shape(model: ModelMixin, heads: Counts, neurons: Counts) -> dict[str, int]:
    """The config entries of a model of the same class with fewer, wider heads; none where heads stay.

    Raises:
        ValueError: no config of the class says it.
    """
    if neurons is not None:
        raise ValueError("no config of the class has fewer neurons; leave `neurons` out or `plain`")
    if heads is None:
        return {}
    keys = ("num_attention_heads", "attention_head_dim")
    count, width = (model.config.get(key) for key in keys)
    blocks = attention_blocks(model).values()
    equal = all((block.heads, block.head_dim) == (count, width) for block in blocks)
    if not isinstance(heads, int) or not equal or count * width % heads:
        raise ValueError(
            f"no config of {type(model).__name__} has {heads} heads in its width; "
            "give one number that divides it, or leave `plain` out"
        )
    return dict(zip(keys, (heads, count * width // heads), strict=True))


def _wanted(have: Mapping[str, int], counts: Counts, what: str) -> dict[str, int]:
    """The modules that are to have fewer, and how many."""
    if counts is None:
        return {}
    if not have:
        raise ValueError(f"the model has no {what} that can be squeezed")
    if isinstance(counts, Mapping):
        asked = dict(counts)
    elif isinstance(counts, int):
        asked = dict.fromkeys(have, counts)
    elif 0 < counts <= 1:
        asked = {name: max(1, round(counts * count)) for name, count in have.items()}
    else:
        raise ValueError(f"a share of {counts} {what} cannot stay: between 0 and 1 can")
    for name, count in asked.items():
        if name not in have:
            raise ValueError(f"the model has no `{name}` with {what}; it has {', '.join(have)}")
        if not 1 <= count <= have[name]:
            raise ValueError(f"`{name}` has {have[name]} {what}, which cannot become {count}")
    return {name: count for name, count in asked.items() if count < have[name]}


# --- the walk -----------------------------------------------------------------------------------------------


def passes(
    model: ModelMixin, batches: Iterable[Batch], predict: Predict, into: list[Tensor]
) -> list[Callable[[], Tensor]]:
    """A forward pass of every batch, which returns its prediction and leaves it in `into`."""

    def run(batch: Batch) -> Tensor:
        into.append(predict(model, *batch))
        return into[-1]

    return [functools.partial(run, batch) for batch in batches]


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
    return [torch.nn.functional.linear(x, weight, layer.bias) for x in inputs]


def _origin(name: str, origins: Mapping[str, str]) -> str:
    """A module's path before blocks left."""
    for block, before in origins.items():
        if name.startswith(f"{block}."):
            return before + name.removeprefix(block)
    return name


def _squeeze_depth(
    model: ModelMixin, keep: int, passes: list[Callable[[], Tensor]], tell: Callable[[Part], None]
) -> dict[str, str]:
    """Take the least important blocks out; the old path of every block that stays, by its new one."""
    count = len(block_list(model)[1])
    if not 1 <= keep <= count:
        raise ValueError(f"the model has {count} blocks, which cannot become {keep}")
    if keep == count:
        return {}
    importances = block_importances(model, passes)
    removed = blocks_to_remove(importances, dict.fromkeys(importances, 1.0), keep)
    for name in removed:
        tell(Part(name, "block", 1, 0, 0.0, importances[name]))
    return remove_blocks(model, removed)
