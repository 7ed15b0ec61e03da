"""Which blocks of a model matter least, and the model without them (docs/method.md section 8)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from diffusers import ModelMixin
from torch import nn

from shd_diffusion.compression.walk import CalibrationBatch, Predict, copy_sharing, passes, relative_change
from shd_diffusion.models.squeezed import CONFIG_KEYS


def block_list(model: ModelMixin) -> tuple[str, nn.ModuleList]:
    """The list of `num_layers` equal blocks that a model consists of, and its name.

    Raises:
        ValueError: the model has several, or none.
    """
    depth = getattr(model.config, "num_layers", None)
    lists = {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList)}
    blocks = {name: each for name, each in lists.items() if len(each) == depth}
    if len(blocks) != 1 or any(len(each) > 1 for name, each in lists.items() if name not in blocks):
        raise ValueError(
            f"{type(model).__name__} is no stack of `num_layers` blocks: none can leave; most classes let a student of "
            "fewer begin from these weights (`student.init: squeeze` of `distill`)"
        )
    return next(iter(blocks.items()))


@torch.no_grad()
def block_importances(
    model: ModelMixin, batches: Sequence[CalibrationBatch], predict: Predict, names: Collection[str]
) -> dict[str, float]:
    """What the model's output loses without one block: |change|² / |output|² by block.

    LAPTOP-Diff's criterion (arXiv 2404.11098), which takes the changes of several blocks to add up.

    Args:
        model: see `block_list`.
        batches: see `compress`.
        predict: see `compress`.
        names: module paths of the blocks in question.

    Raises:
        ValueError: see `remove_blocks`.
    """
    outputs = [run() for run in passes(model, batches, predict)] if names else []
    importances = {}
    for name in names:
        smaller = copy_sharing(model)
        remove_blocks(smaller, [name])
        importances[name] = relative_change((run() for run in passes(smaller, batches, predict)), outputs)
    return importances


def removable_blocks(model: ModelMixin) -> list[str]:
    """Paths of the blocks that can leave; none where the model is no stack of several."""
    try:
        name, blocks = block_list(model)
    except ValueError:
        return []
    paths = [f"{name}.{index}" for index in range(len(blocks))]
    found = [path for path in paths if _can_leave(model, [path])]
    # where the class makes blocks by their depth, one may leave and several may not
    return found if _can_leave(model, found[: len(paths) - 1]) else []


def _can_leave(model: ModelMixin, paths: Sequence[str]) -> bool:
    try:
        remove_blocks(copy_sharing(model), paths)
    except ValueError:
        return False
    return True


def remove_blocks(model: ModelMixin, removed: Sequence[str]) -> dict[str, str]:
    """Take blocks out of a model, in place; its config says so.

    Args:
        model: see `block_list`.
        removed: their module paths.

    Returns:
        The old path of every block that stays, by its new one.

    Raises:
        ValueError: none would stay, or the class makes other blocks of that config, as where the last one is special.
    """
    name, blocks = block_list(model)
    kept = [index for index in range(len(blocks)) if f"{name}.{index}" not in removed]
    if not kept:
        raise ValueError(f"all blocks of {type(model).__name__} cannot leave")
    setattr(model, name, nn.ModuleList(blocks[index] for index in kept))
    origins = {f"{name}.{new}": f"{name}.{old}" for new, old in enumerate(kept)}
    model.register_to_config(num_layers=len(kept))
    for key in CONFIG_KEYS:  # of a model that was squeezed before
        counts = dict(model.config.get(key) or {})
        renamed = {path: count for path, count in counts.items() if not path.startswith(f"{name}.")}
        for new, old in origins.items():
            inside = {path: count for path, count in counts.items() if path.startswith(f"{old}.")}
            renamed |= {new + path.removeprefix(old): count for path, count in inside.items()}
        if counts:
            model.register_to_config(**{key: renamed})
    with torch.device("meta"):
        twin = type(model).from_config(model.config)
    if _shapes(twin) != _shapes(model):
        raise ValueError(f"{type(model).__name__} has none of its blocks in place of {', '.join(removed)}")
    return origins


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}
