"""A smaller model from a trained one by least squares, block after block (docs/method.md section 8)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
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
from shd_diffusion.compression.depth import (
    block_importances,
    block_list,
    removable_blocks,
    remove_blocks,
)
from shd_diffusion.compression.feed_forward import squeeze_feed_forward
from shd_diffusion.compression.walk import (
    CalibrationBatch,
    Predict,
    copy_sharing,
    have_apart,
    passes,
    relative_change,
    walk_beside,
)
from shd_diffusion.models.layouts import feed_forwards
from shd_diffusion.models.squeezed import declare_shape, shape, squeezed_class
from shd_diffusion.squeezing.blocks import blocks_to_remove
from shd_diffusion.squeezing.plan import BlockPlan, Round, plan_groups

Counts: TypeAlias = int | float | Mapping[str, int] | None
"""A count for every module, a share of what each has, counts by module path in the teacher, or None: all of them."""


@dataclass(frozen=True, slots=True)
class CompressedPart:
    """What became of one module.

    Attributes:
        name: module path in the model that was compressed.
        what: what it has fewer of; `block` is a block that left.
        before: how many it had.
        after: how many it has.
        lost_before: |error|² / |teacher's output|², about the means: of merged heads before the refit, of the layer
            with all its neurons. It includes what the squeezed blocks before it have moved. Neurons whose layer also
            projects heads count with them.
        lost: the same in the end. Of a block: the change of the model's output without it alone.
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
        groups: by module path in the model, the teacher's heads behind each head of an attention block that lost some.
        origins: the teacher's path of each block by its own, where blocks left.
    """

    model: ModelMixin
    parts: tuple[CompressedPart, ...]
    lost: float
    groups: Mapping[str, Round]
    origins: Mapping[str, str]


@torch.no_grad()
def compress(
    teacher: ModelMixin,
    batches: Iterable[CalibrationBatch],
    predict: Predict,
    heads: Counts = None,
    neurons: Counts = None,
    blocks: int | Collection[str] | None = None,
    options: HeadOptions | None = None,
    plain: bool = False,
    report: Callable[[CompressedPart], object] = lambda part: None,
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
        blocks: how many stay, or which by their module paths; None for all.
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
    student = copy_sharing(teacher)  # what is squeezed has its own parameters when its turn comes
    parts: list[CompressedPart] = []
    groups: dict[str, Round] = {}

    def tell(part: CompressedPart) -> None:
        parts.append(part)
        report(part)

    origins: dict[str, str] = {}
    if blocks is not None:
        origins = _squeeze_depth(student, blocks, held, predict, tell)
    stock = shape(student)
    wanted = {name: asked[origin(name, origins)] for name in stock if origin(name, origins) in asked}

    predicted: tuple[list[Tensor], list[Tensor]] = [], []
    of_teacher = {name: origin(name, origins) for name in wanted}
    walk = walk_beside(
        teacher,
        student,
        of_teacher,
        passes(teacher, held, predict, predicted[0]),
        passes(student, held, predict, predicted[1]),
    )
    with closing(walk):
        for name, calls, targets in walk:
            have_apart(student, teacher, name)
            what: Literal["heads", "neurons"]
            if name in feed_forwards(student):
                (target,) = targets.values()
                what, fit = "neurons", squeeze_feed_forward(student, name, wanted[name], calls, target)
            else:
                groups[name], *of_heads = squeeze_attention(
                    student, name, wanted[name], calls, targets, options
                )
                what, fit = "heads", (of_heads[0], of_heads[1])
            tell(CompressedPart(of_teacher[name], what, stock[name], wanted[name], *fit))
    have_apart(student, teacher)
    if plain_shape:
        if idle := [name for name, count in wanted.items() if shape(student)[name] != count]:
            raise ValueError(
                f"`{idle[0]}` runs with no calibration batch, so the class cannot stay; leave `plain` out"
            )
        student.register_to_config(**plain_shape)
    else:
        declare_shape(student, stock)
    lost = relative_change(predicted[1], predicted[0])
    return CompressedModel(student, tuple(parts), lost, groups, origins)


def block_plans(groups: Mapping[str, Round], origins: Mapping[str, str]) -> dict[str, BlockPlan]:
    """The plans by which heads merged, by block; see `CompressedModel`."""
    return {name: BlockPlan(plan_groups(merged), origin(name, origins)) for name, merged in groups.items()}


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
    if not equal:
        raise ValueError(
            f"the blocks of this {type(model).__name__} differ in the number or the width of their heads, or its "
            "config counts them under another key; leave `plain` out"
        )
    if not isinstance(heads, int) or count * width % heads:
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


# --- depth ------------------------------------------------------------------------------------------------


def origin(name: str, origins: Mapping[str, str]) -> str:
    """The teacher's path of a module, from that of each block that is another there."""
    for block, before in origins.items():
        if name.startswith(f"{block}."):
            return before + name.removeprefix(block)
    return name


def _squeeze_depth(
    model: ModelMixin,
    keep: int | Collection[str],
    batches: Sequence[CalibrationBatch],
    predict: Predict,
    tell: Callable[[CompressedPart], None],
) -> dict[str, str]:
    """Take out the least important blocks, or those not named; the old path of each that stays, by its new one."""
    list_name, blocks = block_list(model)
    names = [f"{list_name}.{index}" for index in range(len(blocks))]
    if isinstance(keep, int):
        if not 1 <= keep <= len(names):
            raise ValueError(f"the model has {len(names)} blocks, which cannot become {keep}")
        can_leave = removable_blocks(model) if keep < len(names) else []
        if len(names) - keep > len(can_leave):
            raise ValueError(f"of the model's {len(names)} blocks only {len(can_leave)} can leave")
        importances = block_importances(model, batches, predict, can_leave)
        others = len(names) - len(can_leave)
        removed = blocks_to_remove(importances, dict.fromkeys(importances, 1.0), max(0, keep - others))
    else:
        if not keep or not set(keep) <= set(names):
            raise ValueError(
                f"blocks that stay are some of {', '.join(names)}, not {', '.join(keep) or 'none'}"
            )
        removed = [name for name in names if name not in keep]
        importances = block_importances(model, batches, predict, removed)
    for name in removed:
        tell(CompressedPart(name, "block", 1, 0, 0.0, importances[name]))
    return remove_blocks(model, removed) if removed else {}
