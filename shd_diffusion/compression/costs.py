"""What a model's blocks cost and what smaller ones save: counted or timed, each kind of block once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from shd_diffusion.attention import attention_blocks
from shd_diffusion.compression.lockstep import Call
from shd_diffusion.models.denoiser import count_parameters
from shd_diffusion.models.layouts import head_layout
from shd_diffusion.models.squeezed import cut_heads, cut_neurons, first_heads, shape
from shd_diffusion.operations import Meter

Unit = Literal["parameters", "macs", "latency"]
UNITS: dict[Unit, str] = {
    "parameters": "parameters",
    "macs": "multiply-adds of a denoiser call for one image",
    "latency": "seconds of a denoiser call for one image, here",
}
HELD = "module"
SECONDS = 0.2  # that a block is timed, at least

Measure: TypeAlias = Callable[[nn.Module, Sequence[Call]], float]
"""What a module costs in its calls."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model costs.

    Attributes:
        total: of the whole model.
        saved: by path of each part and number of heads or neurons, what it then saves.
        blocks: of each block.
    """

    total: float
    saved: dict[str, dict[int, float]]
    blocks: dict[str, float]


def cost_of(model: nn.Module, unit: Unit, run: Callable[[], object]) -> float:
    """What a model costs, as `run` calls it."""
    return MEASURES[unit](model, _calls(model, [""], run)[""])


@torch.no_grad()
def measure_costs(
    model: nn.Module,
    unit: Unit,
    counts: Mapping[str, Sequence[int]],
    blocks: Sequence[str],
    run: Callable[[], object],
) -> Costs:
    """What a model costs, and what fewer heads, neurons and blocks save.

    What a part saves is measured on the module around it, which holds all that its heads or neurons go through. Of
    modules of the same kind, called with tensors of the same shapes, one is measured.

    Args:
        model: in evaluation mode; it stays as it is.
        unit: of the costs.
        counts: numbers of heads or neurons by path of the part.
        blocks: module paths.
        run: calls the model once.
    """
    around = {name: name.rpartition(".")[0] for name in counts}
    calls = _calls(model, ["", *around.values(), *blocks], run)
    known: dict[Any, float] = {}

    def measure(path: str, leaf: str = "", count: int = 0) -> float:
        module = model.get_submodule(path)
        key = _kind(module, calls[path]), leaf, count
        if key not in known:
            smaller = _cut(module, leaf, count) if leaf else module
            known[key] = MEASURES[unit](smaller, calls[path])
        return known[key]

    saved: dict[str, dict[int, float]] = {}
    for name, of_part in counts.items():
        path, leaf = around[name], name.rpartition(".")[2]
        by_count = {count: measure(path, leaf, count) for count in sorted(of_part)}
        # timings may say that less takes longer, which the closest rising sequence does not
        *cut, whole = isotonic_regression([*by_count.values(), measure(path)]).x
        saved[name] = {count: float(whole - cost) for count, cost in zip(by_count, cut, strict=True)}
    return Costs(measure(""), saved, {name: measure(name) for name in blocks})


# --- measures -----------------------------------------------------------------------------------------------


def _parameters(module: nn.Module, calls: Sequence[Call]) -> float:
    return count_parameters(module)


def _macs(module: nn.Module, calls: Sequence[Call]) -> float:
    with Meter() as meter:
        for call in calls:
            module(*call.args, **call.kwargs)
    return meter.operations / 2


def _seconds(module: nn.Module, calls: Sequence[Call]) -> float:
    """The median of what the calls take together, once warm."""
    if not calls:
        return 0.0  # less than what it takes to call nothing

    def run() -> None:
        for call in calls:
            module(*call.args, **call.kwargs)

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=SECONDS).median


MEASURES: dict[Unit, Measure] = {"parameters": _parameters, "macs": _macs, "latency": _seconds}

# --- modules and their calls --------------------------------------------------------------------------------


def _calls(model: nn.Module, names: Sequence[str], run: Callable[[], object]) -> dict[str, list[Call]]:
    """The calls of each module by path; that of the model itself is empty."""
    found: dict[str, list[Call]] = {name: [] for name in names}

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[name].append(Call(name, args, kwargs))

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(keep, name), with_kwargs=True)
        for name in found
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _kind(module: nn.Module, calls: Sequence[Call]) -> tuple[Any, ...]:
    """What two modules and their calls have in common that cost the same."""
    tensors = [
        (key, tuple(value.shape))
        for call in calls
        for key, value in [*enumerate(call.args), *call.kwargs.items()]
        if isinstance(value, Tensor)
    ]
    return repr(module), tuple(shape(_held(module)).items()), tuple(tensors)


def _cut(module: nn.Module, leaf: str, count: int) -> nn.Module:
    """A copy of a module in which the part of that name has so many heads or neurons."""
    holder, name = _held(copy.deepcopy(module)), f"{HELD}.{leaf}"
    if name in attention_blocks(holder):
        cut_heads(holder, name, first_heads(head_layout(holder, name), count))
    else:
        cut_neurons(holder, name, torch.arange(count))
    return holder[HELD]


def _held(module: nn.Module) -> nn.ModuleDict:
    """A model around a module, where its path is not empty."""
    return nn.ModuleDict({HELD: module})
