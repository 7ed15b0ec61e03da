"""What chosen modules of a model put out, while the model runs as it always does."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shd_diffusion.attention.capture import unwrap
from shd_diffusion.attention.processors import in_backward


def output_tensors(module: str, output: Any) -> dict[str, Tensor]:
    """The tensors that a module puts out, by name: its path, or `<path>:<position>` of each in a tuple."""
    if isinstance(output, Tensor):
        return {module: output}
    if not isinstance(output, tuple | list):
        return {}
    return {f"{module}:{place}": part for place, part in enumerate(output) if isinstance(part, Tensor)}


class OutputCapture:
    """Context in which every forward pass of `model` leaves what named modules put out.

    An output is kept with its graph. What a backward pass runs again (non-reentrant gradient checkpointing) is
    not kept.

        with OutputCapture(student, ["transformer_blocks.0"]) as capture:
            student(noised, timestep=timesteps, class_labels=labels)
            tokens = capture.outputs["transformer_blocks.0"]

    Args:
        model: a diffusers model, also inside DistributedDataParallel.
        names: module paths inside the model, or `<path>:<position>` where a module puts out several tensors.

    Attributes:
        outputs: of the last forward pass by name.

    Raises:
        AttributeError: the model has no such module.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model = unwrap(model)
        self._wanted: dict[str, list[str]] = {}
        for name in names:
            self._wanted.setdefault(name.partition(":")[0], []).append(name)
        self._modules = {path: self._model.get_submodule(path) for path in self._wanted}
        self._hooks: list[Any] = []
        self._with_gradients = False
        self.outputs: dict[str, Tensor] = {}

    def __enter__(self) -> OutputCapture:
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin),
            *(m.register_forward_hook(partial(self._keep, path)) for path, m in self._modules.items()),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.outputs = {}

    def _begin(self, *_: Any) -> None:
        self.outputs, self._with_gradients = {}, torch.is_grad_enabled()

    def _keep(self, path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if in_backward():
            return
        if self._with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                f"`{path}` runs without gradients in a forward pass that has them, under reentrant "
                "checkpointing; checkpoint with use_reentrant=False (diffusers' default)"
            )
        found = output_tensors(path, output)
        for name in self._wanted[path]:
            if name not in found:
                raise RuntimeError(
                    f"`{path}` puts out {type(output).__name__}, and no tensor `{name}`: it has no features to match"
                )
            self.outputs[name] = found[name]
