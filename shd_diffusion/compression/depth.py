"""Which blocks of a model matter least, and the model without them (docs/method.md section 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn


def block_list(model: ModelMixin) -> tuple[str, nn.ModuleList]:
    """The list of `num_layers` equal blocks that a model consists of, and its name.

    Raises:
        ValueError: the model has several, or none.
    """
    depth = getattr(model.config, "num_layers", None)
    lists = {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList)}
    blocks = {name: each for name, each in lists.items() if len(each) == depth}
    if len(blocks) != 1 or any(len(each) > 1 for name, each in lists.items() if name not in blocks):
        raise ValueError(f"{type(model).__name__} is no stack of `num_layers` blocks: none can leave")
    return next(iter(blocks.items()))


@torch.no_grad()
def block_importances(model: ModelMixin, passes: Sequence[Callable[[], Tensor]]) -> dict[str, float]:
    """What skipping one block changes of the model's output: |change|² / |output|² by block.

    LAPTOP-Diff's criterion (arXiv 2404.11098), which takes the changes of several blocks to add up.

    Args:
        model: see `block_list`.
        passes: functions that run the model on a batch each and return its output.

    Raises:
        ValueError: a block puts out something else than what it takes in.
    """
    name, blocks = block_list(model)
    outputs = [run() for run in passes]
    energy = sum(float(output.double().square().sum()) for output in outputs)
    importances = {}
    for index, block in enumerate(blocks):
        with block.register_forward_hook(_skip, with_kwargs=True):
            changes = (run() - output for run, output in zip(passes, outputs, strict=True))
            changed = sum(float(change.double().square().sum()) for change in changes)
        importances[f"{name}.{index}"] = changed / energy
    return importances


def _skip(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """Stands in for a block's output: its input."""
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    if not isinstance(output, Tensor) or output.shape != hidden_states.shape:
        raise ValueError(f"a {type(block).__name__} puts out more than one stream: it cannot be left out")
    return hidden_states


def remove_blocks(model: ModelMixin, removed: Sequence[str]) -> dict[str, str]:
    """Take blocks out of a model, in place; its config says so.

    Args:
        model: see `block_list`.
        removed: their module paths.

    Returns:
        The old path of every block that stays, by its new one.
    """
    name, blocks = block_list(model)
    kept = [index for index in range(len(blocks)) if f"{name}.{index}" not in removed]
    setattr(model, name, nn.ModuleList(blocks[index] for index in kept))
    model.register_to_config(num_layers=len(kept))
    return {f"{name}.{new}": f"{name}.{old}" for new, old in enumerate(kept)}
